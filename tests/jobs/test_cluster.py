"""Fanning out over Ray: results, errors with names, lost workers; the same run as a job."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from jobs.cluster import tasks
from jobs.cluster.common import Common
from pipeline.errors import InputError, Unreachable
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import Files
from schemas.settings import Recipe
from tests.helpers.namespaces import why_not
from tests.helpers.paths import ROOT

# Ray's workers cannot import a test file: its functions travel whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def pieces(count: int, **inputs) -> list[Piece]:
    return [Piece(f"piece-{i:03d}", "", str(i), {"i": i, **inputs}) for i in range(count)]


def square(piece: Piece) -> dict:
    return {"value": piece.inputs["i"] ** 2}


def refuse(piece: Piece) -> dict:
    if piece.inputs["i"] == 3:
        raise InputError("the file is empty; give one that is not")
    return {}


def fail(piece: Piece) -> dict:
    raise ZeroDivisionError("three by nothing")


def die_once(piece: Piece) -> dict:
    seen = Path(piece.inputs["folder"]) / piece.name
    if piece.inputs["i"] == 1 and not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": piece.inputs["i"]}


def tries_of(piece: Piece) -> int:
    """How often this piece was tried, this time with it."""
    with (Path(piece.inputs["folder"]) / piece.name).open("a") as seen:
        seen.write("x")
    return len((Path(piece.inputs["folder"]) / piece.name).read_text())


def no_storage_at_first(piece: Piece) -> dict:
    if tries_of(piece) == 1:
        raise Unreachable("s3://bucket/it cannot be reached: timed out")
    return {}


def full_disk(piece: Piece) -> dict:
    tries_of(piece)
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_and_count(piece: Piece) -> dict:
    tries_of(piece)
    raise InputError("the file is empty; give one that is not")


def test_every_piece_has_its_summary(ray_here):
    done = []
    made = tasks.fan_out(square, pieces(40), done=lambda piece, summary: done.append(piece.name))
    assert made == {p.name: {"value": p.inputs["i"] ** 2} for p in pieces(40)}
    assert sorted(done) == sorted(made)


def names_and(piece: Piece) -> dict:
    return {"names": len(piece.inputs["files"].names), "own": piece.inputs["i"]}


def test_what_pieces_have_in_common_is_sent_once_and_arrives_whole(ray_here):
    """A task's own arguments do not grow with the shards."""
    size = {}
    for count in (10, 10_000):
        files = Files("/x", tuple(f"train-{n:06d}" for n in range(count)), "v")
        some = pieces(20, files=files, settings=Recipe(name="t"), small="train")
        common = Common(some)
        own = [common.parted(piece)[0] for piece in some]
        assert len(common.sent) == 1 and all(set(p.inputs) == {"i", "small"} for p in own)
        size[count] = len(cloudpickle.dumps(own[0]))
        made = tasks.fan_out(names_and, some)
        assert made == {p.name: {"names": count, "own": p.inputs["i"]} for p in some}
    assert size[10_000] == size[10] < 1000


def test_pieces_of_several_splits_have_different_things_in_common(ray_here):
    both = [Files("/x", ("a",) * count, "v") for count in (3, 4)]
    mixed = [Piece(f"p-{i}", "", "f", {"i": i, "files": both[i % 2]}) for i in range(6)]
    made = tasks.fan_out(names_and, mixed)
    assert [made[f"p-{i}"]["names"] for i in range(6)] == [3, 4, 3, 4, 3, 4]


def test_all_that_have_ended_are_taken_at_once(ray_here):
    import ray

    refs = {ray.put(n): n for n in range(5)}
    assert set(tasks._ended(refs)) == set(refs)


def test_nothing_to_do_starts_nothing():
    code = (
        "import sys; from jobs.cluster.tasks import fan_out; fan_out(print, []);"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input_in_a_task_comes_back_as_bad_input_with_the_pieces_name(ray_here):
    with pytest.raises(InputError, match="piece-003: the file is empty; give one that is not"):
        tasks.fan_out(refuse, pieces(6))


def test_a_failure_names_the_piece_and_keeps_its_cause(ray_here):
    with pytest.raises(tasks.WorkFailed, match="piece-000 failed: .*three by nothing") as error:
        tasks.fan_out(fail, pieces(1))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_killed_worker_costs_its_piece_another_try(ray_here, tmp_path):
    made = tasks.fan_out(die_once, pieces(4, folder=str(tmp_path)))
    assert [made[p.name]["value"] for p in pieces(4)] == [0, 1, 2, 3]
    assert (tmp_path / "piece-001").exists()


def test_what_is_lost_and_made_again_is_told_by_name(ray_here, tmp_path):
    said = []
    tasks.fan_out(die_once, pieces(3, folder=str(tmp_path)), say=said.append)
    (line,) = said
    assert line == "  piece-001: its worker was lost; it is made again, try 2 of 4"


def test_storage_that_does_not_answer_costs_another_try(ray_here, tmp_path):
    said = []
    made = tasks.fan_out(no_storage_at_first, pieces(1, folder=str(tmp_path)), say=said.append)
    assert list(made) == ["piece-000"] and (tmp_path / "piece-000").read_text() == "xx"
    assert "piece-000: s3://bucket/it cannot be reached: timed out (on " in said[0]


def test_a_disk_that_stays_full_is_given_up_with_its_sentence(ray_here, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TRIES", 2)
    with pytest.raises(tasks.WorkFailed, match="piece-000 failed: .*No space left on device"):
        tasks.fan_out(full_disk, pieces(1, folder=str(tmp_path)), say=lambda line: None)
    assert (tmp_path / "piece-000").read_text() == "xx"


def test_bad_input_is_not_tried_again(ray_here, tmp_path):
    with pytest.raises(InputError, match="the file is empty"):
        tasks.fan_out(refuse_and_count, pieces(1, folder=str(tmp_path)))
    assert (tmp_path / "piece-000").read_text() == "x"


def test_a_piece_larger_than_every_node_runs_alone_on_the_largest(ray_here):
    large = [Piece(f"piece-{i}", "", str(i), {"i": i}, memory=2**50) for i in range(2)]
    assert tasks.fan_out(square, large) == {"piece-0": {"value": 0}, "piece-1": {"value": 1}}


@pytest.fixture
def nodes(ray_here, monkeypatch):
    """What a stage sees of a cluster of so many nodes, some of them with a GPU."""
    import ray

    def seen(*resources: dict, gpu: bool = False) -> tasks._Nodes:
        here = ray.get_runtime_context().get_node_id()
        names = [here, *(f"node-{i}" for i in range(1, len(resources)))]
        alive = [
            {"NodeID": name, "Alive": True, "NodeManagerHostname": name, "Resources": has}
            for name, has in zip(names, resources, strict=True)
        ]
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        made = tasks._Nodes(pieces(1), gpu, said.append)
        made.looked = float("inf")  # it looks again when it is told to
        return made

    said: list[str] = []
    seen.said = said
    monkeypatch.setattr(tasks._Nodes, "alive", {})
    monkeypatch.setattr(tasks._Nodes, "not_ready", set())
    return seen


STORE = {"object_store_memory": 1e8, "memory": 2.0**30}


def test_work_is_spread_and_kept_off_gpus_where_it_needs_none(nodes):
    cpus, gpus = {"CPU": 4.0, **STORE}, {"CPU": 4.0, "GPU": 1.0, **STORE}
    piece = pieces(1)[0]
    assert nodes(cpus, cpus).options(piece)["scheduling_strategy"] == "SPREAD"
    assert nodes(gpus, gpus).options(piece)["scheduling_strategy"] == "SPREAD"
    assert nodes(cpus, gpus).options(piece)["scheduling_strategy"] == "DEFAULT"
    encode = nodes(cpus, gpus, gpu=True).options(piece)
    assert (encode["num_gpus"], encode["scheduling_strategy"]) == (tasks.GPU_SHARE, "SPREAD")
    assert nodes(cpus, cpus, gpu=True).options(piece)["num_gpus"] == 0


def test_when_the_last_gpu_is_gone_the_rest_is_made_without(nodes, monkeypatch):
    import ray

    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, "GPU": 1.0, **STORE}, gpu=True)
    assert not seen.without_gpu() and seen.options(pieces(1)[0])["num_gpus"] == tasks.GPU_SHARE
    both = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: both[:1])
    assert seen.without_gpu() and seen.options(pieces(1)[0])["num_gpus"] == 0
    assert (
        nodes.said[-1] == "  no node with a GPU is left; what is still to be made is made without"
    )
    assert not seen.without_gpu()  # said once


def test_a_failed_node_is_not_left_out_where_no_other_has_what_a_task_takes(nodes):
    cpus, gpus = {"CPU": 1.0, **STORE}, {"CPU": 1.0, "GPU": 1.0, **STORE}
    head = {"CPU": 0.0, **STORE}
    for about, gpu in (((cpus, gpus), True), ((head, cpus), False)):
        seen = nodes(*about, gpu=gpu)
        seen.failed = {"node-1"}
        assert seen.options(pieces(1)[0])["label_selector"] is None


def waits_without_a_gpu(piece: Piece) -> dict:
    import ray

    (Path(piece.inputs["folder"]) / piece.name).touch()
    while ray.get_gpu_ids():  # it hangs there, as on a node that is gone
        time.sleep(0.1)
    return {"sees": os.environ["CUDA_VISIBLE_DEVICES"]}


LOST = """
import json, sys, threading, time
from pathlib import Path
from jobs.cluster import tasks
from tests.jobs import test_cluster

import ray
from ray import cloudpickle
cloudpickle.register_pickle_by_value(test_cluster)
tasks.start_here(2, num_gpus=1)
nodes, folder = ray.nodes, Path(sys.argv[1])

def after_a_while():
    found = nodes()
    if (folder / "piece-000").exists():
        found[0]["Resources"].pop("GPU", None)
    return found

ray.nodes = after_a_while  # what Ray says of a cluster whose GPU is gone
pieces = test_cluster.pieces(2, folder=str(folder))
said = []
made = tasks.fan_out(test_cluster.waits_without_a_gpu, pieces, gpu=True, say=said.append)
print(json.dumps([made, said]))
"""


@pytest.mark.own_cluster
def test_tasks_that_wait_for_a_gpu_that_is_gone_are_made_without(tmp_path):
    command = [sys.executable, "-c", LOST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    made, said = json.loads(done.stdout.splitlines()[-1])
    assert made == {f"piece-00{i}": {"sees": ""} for i in range(2)}
    assert said == ["  no node with a GPU is left; what is still to be made is made without"]


def test_a_task_asks_for_the_memory_of_its_piece_or_of_the_largest_node(nodes):
    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE, "memory": 2.0**32})
    for memory, asked in ((0, None), (5000, 5000), (2**40, 2**32)):
        assert seen.options(Piece("p", "", "f", {}, memory))["memory"] == asked


def test_a_node_that_failed_is_left_out_while_there_is_another(nodes):
    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    piece = pieces(1)[0]
    seen.failed = {"node-1", "long gone"}
    assert seen.options(piece)["label_selector"] == {"ray.io/node-id": "!in(node-1)"}
    seen.failed |= seen.alive.keys()
    assert seen.options(piece)["label_selector"] is None


def test_inputs_in_flight_fill_half_a_store_at_most(nodes):
    import numpy as np

    seen = nodes({"CPU": 4.0, **STORE}, {"CPU": 4.0, **STORE})
    assert seen.window() == 32
    seen.largest = tasks._bytes(Piece("p", "", "f", {"rows": np.zeros(10**7, np.int8)}))
    assert seen.window() == 5


def test_as_many_tasks_wait_as_end_between_two_looks(nodes):
    """One to three a CPU, beside those that run: long tasks need no long queue."""
    seen = nodes({"CPU": 100.0, **STORE}, {"CPU": 100.0, **STORE})
    for rate, window in ((0.0, 400), (150.0, 500), (10**6, 800)):
        seen.rate = rate
        assert seen.window() == window


def test_nodes_are_looked_through_once_a_look_and_not_once_a_task(nodes):
    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    piece = pieces(1)[0]
    assert seen.options(piece) is seen.options(piece)
    seen.failed = {"node-1"}
    assert seen.options(piece)["label_selector"] == {"ray.io/node-id": "!in(node-1)"}
    before = seen.options(piece)
    seen.look()
    assert seen.options(piece) is not before


def test_a_piece_lost_with_its_node_names_it_and_goes_elsewhere(nodes):
    import ray

    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    names = {"node-1": "abc123"}
    for node in list(seen.alive.values()):
        node["NodeID"] = names.get(node["NodeID"], node["NodeID"])
    error = ray.exceptions.NodeDiedError("… is dead. Node IP: 10.0.0.3, node ID: abc123. This …")
    assert seen.passing(error) == "its node node-1 was lost"
    assert seen.options(pieces(1)[0])["label_selector"] == {"ray.io/node-id": "!in(abc123)"}


def test_a_node_that_cannot_be_made_ready_is_named_with_its_reason_and_left_out(nodes):
    import ray

    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    for number, node in enumerate(seen.alive.values()):
        node["NodeManagerAddress"] = f"10.0.0.{number}"
    error = ray.exceptions.RuntimeEnvSetupError(
        "[Node 10.0.0.1] Traceback (most recent call last):\n  File …\n"
        "OSError: [Errno 28] No space left on device: '/mnt/ray'\n"
    )
    reason = "[Errno 28] No space left on device: '/mnt/ray'"
    assert seen.passing(error) == f"node-1 could not be made ready: {reason}"
    in_the_next_stage = tasks._Nodes(pieces(1), False, print)
    assert in_the_next_stage.left_out() == {"ray.io/node-id": "!in(node-1)"}


def test_nodes_that_come_and_go_are_named(nodes, monkeypatch):
    import ray

    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    both = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: both[:1])
    seen.look()
    monkeypatch.setattr(ray, "nodes", lambda: both)
    seen.look()
    assert nodes.said == ["  node node-1 is lost, 1 left", "  node node-1 has joined, 2 now"]
    assert seen.window() == 8


def test_nodes_that_go_together_are_counted_one_by_one(nodes, monkeypatch):
    import ray

    seen = nodes({"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE}, {"CPU": 1.0, **STORE})
    all_three = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: all_three[:1])
    seen.look()
    assert nodes.said == ["  node node-1 is lost, 2 left", "  node node-2 is lost, 1 left"]


def test_with_json_standard_output_is_json_alone(finished_run, tiny_encoder, capsys, monkeypatch):
    from ray._private.worker import print_to_stdstream

    from jobs import evaluate
    from jobs.cli import main
    from tests.helpers.stages import TINY

    def beside_a_dying_node(run, evaluated=evaluate.run):
        print_to_stdstream({"lines": ["marked dead"], "pid": "raylet", "is_err": False}, False)
        evaluated(run)

    command = dataclasses.replace(evaluate.COMMAND, run=beside_a_dying_node)
    monkeypatch.setattr(evaluate, "COMMAND", command)
    argv = [*TINY, "--root", finished_run, "--encoder", tiny_encoder, "--json"]
    main.main("evaluate", argv)
    said = capsys.readouterr()
    assert "base" in json.loads(said.out)["models"]["main"]["metrics"]
    assert "marked dead" in said.err


@pytest.mark.own_cluster
@pytest.mark.skipif(
    not why_not(), reason="tests/whole/test_object_store_cluster.py submits it to two nodes"
)
def test_a_submitted_job_gives_what_the_local_command_gives(finished_run, tiny_encoder, tmp_path):
    """`ray start --head`, then `ray job submit … python -m jobs.end_to_end`, on this machine."""
    from tests.helpers.stages import TINY

    binaries = Path(sys.executable).parent
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_JOB")},
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": "/tmp",
    }
    root = tmp_path / "job" / "tiny"
    start = [
        *(binaries / "ray", "start", "--head", "--port=23679", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", "--dashboard-port=23665", "--include-dashboard=true"),
        *("--dashboard-agent-listen-port=23667", "--dashboard-agent-grpc-port=23668"),
        *("--object-store-memory=200000000", "--temp-dir", f"/tmp/halftone-{os.getpid()}"),
        "--block",
    ]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        command = [
            *(binaries / "ray", "job", "submit", "--address", "http://127.0.0.1:23665"),
            *("--working-dir", str(ROOT), "--", "python", "-m"),
            *("jobs.end_to_end", *TINY, "--root", str(root), "--encoder", tiny_encoder),
        ]
        for _ in range(100):
            job = subprocess.run(command, env=environment, capture_output=True, text=True)
            said = job.stdout + job.stderr
            if "Failed to connect" not in said and "No available agent" not in said:
                break  # the head is up: this was the job itself
            time.sleep(2)
        assert job.returncode == 0, (job.stdout + job.stderr)[-3000:]
    finally:
        head.terminate()  # `ray start --block` then ends what it started
        try:
            head.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            json.loads((Path(folder) / stage / "main/metrics.json").read_text())["metrics"]
            for folder in (finished_run, root)
        )
        assert here == there
    here, there = (sorted(Path(f).glob("2-shards/*.tar")) for f in (finished_run, root))
    assert [t.read_bytes() for t in here] == [t.read_bytes() for t in there]


NICE = """
import os
from jobs.cluster import tasks
tasks.start_here(1)
import ray
print(os.nice(0), ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


@pytest.mark.parametrize(("asked", "more"), [(None, 0), ("2", 2)])
def test_workers_of_this_machines_ray_are_as_nice_as_the_command(asked, more):
    environment = {**os.environ, "RAY_worker_niceness": asked}
    if asked is None:
        del environment["RAY_worker_niceness"]
    command = ["nice", "-n", "3", sys.executable, "-c", NICE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    own, of_worker = map(int, done.stdout.split())
    assert of_worker == own + more
