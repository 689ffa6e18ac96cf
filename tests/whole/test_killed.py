"""The whole command, killed -9 on its way, ends where an undisturbed one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.storage import store
from tests.chaos import shards
from tests.helpers.paths import ROOT
from tests.helpers.stages import TINY

# What lies in the run folder when the command is killed: in the middle of a stage each time.
BEFORE_TRAINING = (
    "2-shards/*.parquet",
    "3-embeddings/tiny/*.parquet",
    "4-relevance/tiny/*.parquet",
)
ON_RAY = (
    "5-model/main/checkpoints/step-00000030/checkpoint.json",
    "6-rankings/main/vectors/*.parquet",
)
# The same command with every piece made in its own process: it dies at the same places, sooner.
HERE = """
import sys
import pytest
from jobs.cli.main import main
from tests.helpers.stages import make_here
make_here(pytest.MonkeyPatch())
main("run", sys.argv[1:])
"""
LONGEST = 1200  # seconds for one command, on a machine with much else to do


def start(root: Path, encoder: str, *, on_ray: bool) -> subprocess.Popen:
    """The whole command, in a process group of its own; what it prints goes beside its folder."""
    command = ["-m", "jobs.end_to_end"] if on_ray else ["-c", HERE]
    with root.with_name("printed.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command, *TINY, "--root", str(root), "--encoder", encoder],
            **{"stdout": log, "stderr": log, "cwd": ROOT},
            start_new_session=True,
        )


def kill_when(running: subprocess.Popen, root: Path, moment: str) -> None:
    deadline = time.monotonic() + LONGEST
    while not list(root.glob(moment)):
        assert running.poll() is None and time.monotonic() < deadline, printed(root, moment)
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def printed(root: Path, moment: str) -> str:
    return f"no {moment}: {root.with_name('printed.txt').read_text()[-3000:]}"


@pytest.mark.own_cluster
def test_a_run_killed_again_and_again_ends_with_the_same_numbers(
    finished_run, tiny_encoder, tmp_path
):
    root = tmp_path / "runs" / "tiny"
    root.parent.mkdir()
    for moment in (*BEFORE_TRAINING, *ON_RAY):
        kill_when(start(root, tiny_encoder, on_ray=moment in ON_RAY), root, moment)
    assert start(root, tiny_encoder, on_ray=False).wait(LONGEST) == 0, printed(root, "end")
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            store.read_json(f"{folder}/{stage}/main/metrics.json")["metrics"]
            for folder in (finished_run, root)
        )
        assert here == there
    files = ("2-shards/*.tar", "3-embeddings/tiny/*.parquet", "4-relevance/tiny/*.parquet")
    for there in (path for pattern in files for path in Path(finished_run).glob(pattern)):
        assert there.read_bytes() == (root / there.relative_to(finished_run)).read_bytes()


@pytest.mark.own_cluster
@pytest.mark.chaos
def test_shards_are_the_same_whatever_is_killed_on_the_way(tmp_path):
    """A short one; `python -m tests.chaos.shards --kills 20` is the long one."""
    kills = shards.run(tmp_path, ["task", "driver", "everything"], seed=1)
    assert len(kills) == 3
    assert all(kill.rewritten == 0 for kill in kills if kill.kind != "driver")


@pytest.mark.own_cluster
def test_two_commands_on_one_folder_at_once_leave_what_one_leaves(tmp_path):
    chaos = shards.Chaos(tmp_path, seed=0)
    root = chaos.new("both")
    both = [shards.start(root, workers=2, seed=seed) for seed in (0, 1)]
    assert [command.wait(LONGEST) for command in both] == [0, 0]
    chaos.check(root)
