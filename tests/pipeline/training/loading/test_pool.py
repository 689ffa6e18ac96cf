"""Processes that make batches: what they import, and how they and their parent end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.models.preprocessing import Preprocessing
from pipeline.training.data import Split
from pipeline.training.loading import frames, pool
from tests.helpers.datasets import SIZE, shards
from tests.helpers.paths import ROOT
from tests.pipeline.training.loading.test_loader import (
    closed,  # noqa: F401  (a fixture)
    contents,
    loader_of,
)


def until(holds) -> bool:
    """Whether something comes to hold, within a guard's time."""
    deadline = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_imports_nothing_heavy():
    heavy = ["torch", "ray", "mlflow", "transformers", "pyarrow", "pydantic", "tokenizers"]
    code = "import sys, pipeline.training.loading.process; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.timeout(300)
def test_a_killed_process_is_told_and_the_training_does_not_hang(split, closed):  # noqa: F811
    loader = closed(loader_of(split, workers=2))
    batches = loader.epoch(0)
    whole = [next(batches)]
    os.kill(loader.pool.pids[1], signal.SIGKILL)
    with pytest.raises(pool.ProcessLost, match=r"decoding process \d+ was killed by SIGKILL"):
        whole += list(batches)
    loader.close()
    assert len(list(loader.epoch(0))) == loader.order.steps  # others are started


@pytest.mark.timeout(300)
def test_what_a_killed_process_was_at_is_named(tmp_path, closed):  # noqa: F811
    split = Split(shards(tmp_path, samples=8), "train", preprocessing=Preprocessing.squash(SIZE))
    for tar in split.tars:  # reading begins, and does not end
        Path(tar).unlink()
        os.mkfifo(tar)
    loader = closed(loader_of(split, workers=1))
    batches = loader.epoch(0)
    killer = threading.Thread(target=lambda: kill_when_busy(loader))
    killer.start()
    with pytest.raises(pool.ProcessLost, match=r"killed by SIGKILL.* while it was at \S+ of .*tar"):
        next(batches)
    killer.join()


def kill_when_busy(loader) -> None:
    assert until(lambda: loader.pool is not None and loader.pool.shared.at[0] > 0)
    os.kill(loader.pool.pids[0], signal.SIGKILL)


@pytest.mark.parametrize("end", [lambda loader: loader.close(), lambda loader: None])
def test_processes_end_with_the_loader(split, end):
    loader = loader_of(split, workers=2)
    next(loader.epoch(0))
    pids = loader.pool.pids
    assert all(map(is_there, pids))
    end(loader)
    del loader
    assert until(lambda: not any(map(is_there, pids)))


def test_a_thread_ends_with_the_loader(split):
    before = set(threading.enumerate())
    loader = loader_of(split)
    next(loader.epoch(0))
    assert set(threading.enumerate()) - before
    del loader
    assert until(lambda: not set(threading.enumerate()) - before)


PARENT = """
import json, os, sys, time
from pipeline.models.preprocessing import Preprocessing
from pipeline.training.data import Split
from tests.helpers.datasets import SIZE
from tests.pipeline.training.loading.test_loader import loader_of
split = Split(sys.argv[1], "train", preprocessing=Preprocessing.squash(SIZE))
if sys.argv[2] == "stuck":
    for tar in split.tars:
        os.unlink(tar), os.mkfifo(tar)
loader = loader_of(split, workers=2)
batches = loader.epoch(0)
if sys.argv[2] == "stuck":
    loader._open(), loader._begin(0, 0), loader._fill()
    while not loader.pool.shared.at[0]:
        time.sleep(0.02)
else:
    next(batches)
files = [os.fstat(f).st_ino for f in (loader.frames.file, loader.pool.shared.file)]
print(json.dumps({"pids": loader.pool.pids, "files": files}), flush=True)
time.sleep(600)
"""


def mapped_files() -> set[int]:
    """Inodes of the memory files that any process has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        found |= {int(line.split()[4]) for line in lines if "memfd:halftone" in line}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("doing", ["nothing", "stuck"])
def test_a_parent_that_is_killed_leaves_no_process_and_no_memory(tmp_path, doing):
    root, before = shards(tmp_path, samples=8), set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", PARENT, root, doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        said = json.loads(parent.stdout.readline())
        assert all(map(is_there, said["pids"])) and set(said["files"]) <= mapped_files()
        os.kill(parent.pid, signal.SIGKILL)
    assert until(lambda: not any(map(is_there, said["pids"])))
    assert not set(said["files"]) & mapped_files()
    assert not [n for n in set(os.listdir("/dev/shm")) - before if "halftone" in n]


def test_without_memory_files_a_file_that_is_nowhere_does(split, closed, monkeypatch):  # noqa: F811
    whole = contents(closed(loader_of(split)).epoch(0))
    monkeypatch.delattr(frames.os, "memfd_create")
    assert contents(closed(loader_of(split, workers=2)).epoch(0)) == whole
