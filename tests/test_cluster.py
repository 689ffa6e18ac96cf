"""Fanning out over Ray: results, errors with names, lost workers; the same run as a job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from jobs import _cluster
from pipeline._errors import InputError
from pipeline._plan import Piece

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


def test_every_piece_has_its_summary(ray_here):
    done = []
    made = _cluster.fan_out(square, pieces(40), done=lambda piece, summary: done.append(piece.name))
    assert made == {p.name: {"value": p.inputs["i"] ** 2} for p in pieces(40)}
    assert sorted(done) == sorted(made)


def test_nothing_to_do_starts_nothing():
    code = (
        "import sys; from jobs._cluster import fan_out; fan_out(print, []);"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_input_in_a_task_comes_back_as_bad_input_with_the_pieces_name(ray_here):
    with pytest.raises(InputError, match="piece-003: the file is empty; give one that is not"):
        _cluster.fan_out(refuse, pieces(6))


def test_a_failure_names_the_piece_and_keeps_its_cause(ray_here):
    with pytest.raises(_cluster.WorkFailed, match="piece-000 failed: .*three by nothing") as error:
        _cluster.fan_out(fail, pieces(1))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_killed_worker_costs_its_piece_another_try(ray_here, tmp_path):
    made = _cluster.fan_out(die_once, pieces(4, folder=str(tmp_path)))
    assert [made[p.name]["value"] for p in pieces(4)] == [0, 1, 2, 3]
    assert (tmp_path / "piece-001").exists()


def test_a_submitted_job_gives_what_the_local_command_gives(finished_run, tiny_encoder, tmp_path):
    """`ray start --head`, then `ray job submit … python -m jobs.end_to_end`, on this machine."""
    from conftest import TINY

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
            *("--working-dir", str(Path(__file__).parents[1]), "--", "python", "-m"),
            *("jobs.end_to_end", *TINY, "--root", str(root), "--encoder", tiny_encoder),
        ]
        for _ in range(20):
            job = subprocess.run(command, env=environment, capture_output=True, text=True)
            said = job.stdout + job.stderr
            if "Failed to connect" not in said and "No available agent" not in said:
                break  # the head is up: this was the job itself
            time.sleep(2)
        assert job.returncode == 0, (job.stdout + job.stderr)[-3000:]
    finally:
        head.terminate()  # `ray start --block` then ends what it started
        try:
            head.wait(20)
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
