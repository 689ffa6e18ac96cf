"""Training in the processes of a command's own Ray: together, killed, refused, seen."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray import cloudpickle

from jobs.cluster import tasks, training
from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.storage.plan import Piece
from schemas.settings import TrainSettings
from tests.helpers.paths import ROOT

# Ray's workers cannot import a test file: its functions travel whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def piece_of(folder: Path, **inputs) -> Piece:
    output = str(folder / "5-model" / "main" / "history.json")
    return Piece("model", output, "f", {"folder": str(folder), **inputs})


def ran(fit, folder: Path, workers: int = 2, **settings) -> list[str]:
    """What was said while a training ran to its end."""
    said: list[str] = []
    given = TrainSettings(workers=workers, timeout=60, **settings)
    training.train(fit, piece_of(folder), given, lambda records: None, say=said.append)
    return said


def add_up(piece, report, leaving, live) -> None:
    """Leaves the sum of all ranks, and this process's id, in a file of each rank."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    report([])
    about = {"sum": float(total), "pid": os.getpid(), "size": dist.get_world_size()}
    Path(piece.inputs["folder"], f"rank-{dist.get_rank()}").write_text(json.dumps(about))


def die_once(piece, report, leaving, live) -> None:
    import torch.distributed as dist

    seen = Path(piece.inputs["folder"], "died")
    if dist.get_rank() == 1 and not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(piece, report, leaving, live)


def refuse(piece, report, leaving, live) -> None:
    import torch.distributed as dist

    with Path(piece.inputs["folder"], f"tries-{dist.get_rank()}").open("a") as tries:
        tries.write("x")
    if dist.get_rank() == 1:
        raise InputError("the vocabulary is empty; give captions")
    dist.barrier()  # for one that never comes


def break_down(piece, report, leaving, live) -> None:
    raise ZeroDivisionError("three by nothing")


def outcomes(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*"))]


def pid(piece: Piece) -> dict:
    time.sleep(0.3)  # so that every process gets some
    return {"pid": os.getpid()}


def test_workers_are_one_group_in_the_processes_that_made_the_pieces(ray_here, tmp_path):
    pieces = [Piece(f"piece-{i}", "", str(i), {}) for i in range(8)]
    before = {made["pid"] for made in tasks.fan_out(pid, pieces).values()}
    assert tasks.is_own() and ran(add_up, tmp_path) == []
    found = outcomes(tmp_path)
    assert [(one["sum"], one["size"]) for one in found] == [(3.0, 2), (3.0, 2)]
    assert {one["pid"] for one in found} <= before
    after = {made["pid"] for made in tasks.fan_out(pid, pieces).values()}
    assert after & {one["pid"] for one in found}


def test_a_killed_worker_is_told_and_all_start_again(ray_here, tmp_path):
    (line,) = ran(die_once, tmp_path)
    assert line.startswith("  train: worker ") and "1 was lost (" in line
    assert "WorkerCrashedError" in line and line.endswith("start again from the newest checkpoint")
    assert [one["sum"] for one in outcomes(tmp_path)] == [3.0, 3.0]


def test_bad_input_of_one_worker_ends_the_training_at_once(ray_here, tmp_path):
    with pytest.raises(InputError, match="the vocabulary is empty; give captions"):
        ran(refuse, tmp_path)
    assert [(tmp_path / f"tries-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_what_fails_again_and_again_names_its_cause(ray_here, tmp_path):
    with pytest.raises(tasks.WorkFailed, match="model failed: ZeroDivisionError: three by nothing"):
        ran(break_down, tmp_path, workers=1, max_failures=1)


def note(piece, report, leaving, live) -> None:
    """Two epochs' records, as the loop leaves them with its checkpoints."""
    folder = f"{piece.output.rsplit('/', 1)[0]}/checkpoints"
    for epoch in (1, 2):
        records = [{"step": 10 * e, "epoch": e} for e in range(1, epoch + 1)]
        store.write_json(f"{folder}/records.json", records)
        while not Path(piece.inputs["folder"], f"heard-{epoch}").exists():
            time.sleep(0.05)


def test_records_come_while_it_trains_and_its_machine_is_watched(ray_here, tmp_path):
    heard, watched = [], []

    def record(records: list[dict]) -> None:
        heard.extend(records)
        (tmp_path / f"heard-{len(heard)}").touch()

    @contextmanager
    def monitor(node: str):
        watched.append(node)
        yield
        watched.append("end")

    given = TrainSettings(workers=1)
    training.train(note, piece_of(tmp_path), given, record, monitor, lambda line: None)
    assert [r["epoch"] for r in heard] == [1, 2] and watched == ["node-0", "end"]


ON_ONE_GPU = """
import json, os, sys, threading, time, urllib.request
os.environ["RAY_metrics_report_interval_ms"] = "500"
from pathlib import Path
from jobs.cluster import tasks, training
from pipeline.storage.plan import Piece
from schemas.settings import TrainSettings
import ray

tasks.start_here(2, num_gpus=1)
folder, found = sys.argv[1], {}
pieces = [Piece(f"piece-{i}", "", str(i), {}) for i in range(6)]

def where(piece):
    time.sleep(0.2)
    return {"pid": os.getpid(), "sees": os.environ.get("CUDA_VISIBLE_DEVICES")}

def slow(piece, report, leaving, live):
    while not Path(folder, "scraped").exists():
        live({"samples_per_second": 1250.0, "data_wait": 0.25, "step_seconds": 0.0256})
        time.sleep(0.2)
    found = {"pid": os.getpid(), "sees": os.environ.get("CUDA_VISIBLE_DEVICES")}
    Path(folder, "trained").write_text(json.dumps(found))

def scrape():
    port = ray.nodes()[0]["MetricsExportPort"]
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                lines = page.read().decode().splitlines()
        except OSError:
            lines = []
        lines = [line for line in lines if line.startswith("ray_halftone_")]
        if len(lines) >= 3:
            found["gauges"] = lines
            return Path(folder, "scraped").touch()
        time.sleep(0.3)

for name, gpu in (("cpu", False), ("gpu", True), ("cpu again", False), ("gpu again", True)):
    found[name] = list(tasks.fan_out(where, pieces, gpu=gpu).values())
scraper = threading.Thread(target=scrape, daemon=True)
scraper.start()
piece = Piece("model", f"{folder}/tiny/5-model/main/history.json", "f", {})
training.train(slow, piece, TrainSettings(workers=1), lambda records: None)
scraper.join()
found["trained"] = json.loads(Path(folder, "trained").read_text())
found["gpu, then"] = list(tasks.fan_out(where, pieces, gpu=True).values())
try:
    training.train(slow, piece, TrainSettings(workers=2), lambda records: None)
except Exception as error:
    found["refused"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.own_cluster
def test_on_a_machine_with_a_gpu_processes_stay_warm_and_gauges_are_scraped(tmp_path):
    """Ray is told of a GPU that is not there: it lends it out as if it were."""
    command = [sys.executable, "-c", ON_ONE_GPU, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    pids = {
        k: {m["pid"] for m in v} for k, v in found.items() if isinstance(v, list) and "pid" in v[0]
    }
    of_gpu = pids["gpu"] | pids["gpu again"] | pids["gpu, then"] | {found["trained"]["pid"]}
    assert not pids["cpu"] & of_gpu and pids["cpu again"] <= pids["cpu"]
    assert len(of_gpu) <= 3  # two at a time, and the one that was made ready at the start
    assert {made["sees"] for made in found["cpu"] + found["cpu again"]} == {""}
    assert {made["sees"] for made in [*found["gpu"], found["trained"]]} == {"0"}
    by_name = {line.partition("{")[0]: line for line in found["gauges"]}
    for name, value in (
        ("samples_per_second", 1250),
        ("data_wait", 0.25),
        ("step_seconds", 0.0256),
    ):
        line = by_name[f"ray_halftone_{name}"]
        assert 'run="tiny/5-model/main"' in line and 'worker="0"' in line
        assert float(line.rsplit(" ", 1)[1]) == value
    said = "InputError: train.workers 2 is more than this machine's 1 GPU; set it to 1, or join"
    assert found["refused"].startswith(said)
