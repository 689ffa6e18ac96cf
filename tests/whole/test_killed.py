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
from tests.helpers.stages import TINY

# What lies in the run folder when the command is killed: in the middle of a stage each time.
MOMENTS = (
    "2-shards/*.parquet",
    "3-embeddings/tiny/*.parquet",
    "4-relevance/tiny/*.parquet",
    "5-model/main/checkpoints/step-00000030/checkpoint.json",
    "6-rankings/main/vectors/*.parquet",
)


def start(root: Path, encoder: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.end_to_end", *TINY, "--root", str(root)]
    return subprocess.Popen(
        [*command, "--encoder", encoder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_when(running: subprocess.Popen, root: Path, moment: str) -> None:
    deadline = time.monotonic() + 300
    while not list(root.glob(moment)):
        assert running.poll() is None and time.monotonic() < deadline, moment
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def test_a_run_killed_again_and_again_ends_with_the_same_numbers(
    finished_run, tiny_encoder, tmp_path
):
    root = tmp_path / "runs" / "tiny"
    for moment in MOMENTS:
        kill_when(start(root, tiny_encoder), root, moment)
    assert start(root, tiny_encoder).wait(180) == 0
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            store.read_json(f"{folder}/{stage}/main/metrics.json")["metrics"]
            for folder in (finished_run, root)
        )
        assert here == there
    files = ("2-shards/*.tar", "3-embeddings/tiny/*.parquet", "4-relevance/tiny/*.parquet")
    for there in (path for pattern in files for path in Path(finished_run).glob(pattern)):
        assert there.read_bytes() == (root / there.relative_to(finished_run)).read_bytes()


@pytest.mark.chaos
def test_shards_are_the_same_whatever_is_killed_on_the_way(tmp_path):
    """A short one; `python -m tests.chaos.shards --kills 20` is the long one."""
    kills = shards.run(tmp_path, ["task", "driver", "everything"], seed=1)
    assert len(kills) == 3
    assert all(kill.rewritten == 0 for kill in kills if kill.kind != "driver")


def test_two_commands_on_one_folder_at_once_leave_what_one_leaves(tmp_path):
    chaos = shards.Chaos(tmp_path, seed=0)
    root = chaos.new("both")
    both = [shards.start(root, workers=2, seed=seed) for seed in (0, 1)]
    assert [command.wait(300) for command in both] == [0, 0]
    chaos.check(root)
