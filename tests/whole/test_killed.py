"""The whole command, killed -9 on its way, ends where an undisturbed one ends."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.storage import store
from tests.chaos import shards
from tests.helpers import forked
from tests.helpers.stages import TINY, make_here

# What lies in the run folder when the command is killed: in the middle of a stage each time.
BEFORE_TRAINING = (
    "2-shards/*.parquet",
    "3-embeddings/tiny/*.parquet",
    "4-relevance/tiny/*.parquet",
)
ON_RAY = ("5-model/main/checkpoints/step-00000030/checkpoint.json",)
AFTER_TRAINING = ("6-rankings/main/vectors/*.parquet",)
LONGEST = 1200  # seconds for one command, on a machine with much else to do


def main_here(command: str, arguments: list[str]) -> None:
    """The same with every piece made in this process: it dies at the same places."""
    make_here(pytest.MonkeyPatch())
    main(command, arguments)


def start(run: Callable, root: Path, encoder: str) -> Process:
    """The whole command; what it prints goes beside its folder."""
    printed = str(root.with_name("printed.txt"))
    return forked.start(printed, run, "run", [*TINY, "--root", str(root), "--encoder", encoder])


def kill_when(running: Process, root: Path, moment: str) -> None:
    deadline = time.monotonic() + LONGEST
    while not list(root.glob(moment)):
        assert running.is_alive() and time.monotonic() < deadline, printed(root, moment)
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.join()


def printed(root: Path, moment: str) -> str:
    return f"no {moment}: {root.with_name('printed.txt').read_text()[-3000:]}"


@pytest.mark.own_cluster
def test_a_run_killed_again_and_again_ends_with_the_same_numbers(
    finished_run, tiny_encoder, tmp_path
):
    root = tmp_path / "runs" / "tiny"
    root.parent.mkdir()
    for moment in (*BEFORE_TRAINING, *ON_RAY, *AFTER_TRAINING):
        run = main if moment in ON_RAY else main_here
        kill_when(start(run, root, tiny_encoder), root, moment)
    last = start(main_here, root, tiny_encoder)
    last.join(LONGEST)
    assert last.exitcode == 0, printed(root, "end")
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            store.read_json(f"{folder}/{stage}/main/metrics.json")["metrics"]
            for folder in (finished_run, root)
        )
        assert here == there
    files = ("2-shards/*.tar", "3-embeddings/tiny/*.parquet", "4-relevance/tiny/*.parquet")
    for there in (path for pattern in files for path in Path(finished_run).glob(pattern)):
        assert there.read_bytes() == (root / there.relative_to(finished_run)).read_bytes()


@pytest.fixture(scope="module")
def folder_of_shards(tmp_path_factory) -> Path:
    """Where the undisturbed shards are made once."""
    return tmp_path_factory.mktemp("shards")


@pytest.mark.own_cluster
@pytest.mark.chaos
def test_shards_are_the_same_whatever_is_killed_on_the_way(folder_of_shards):
    """A short one; `python -m tests.chaos.shards --kills 20` is the long one."""
    kills = shards.run(folder_of_shards, ["task", "driver", "everything"], seed=1)
    assert len(kills) == 3
    assert all(kill.rewritten == 0 for kill in kills if kill.kind != "driver")


@pytest.mark.own_cluster
def test_two_commands_on_one_folder_at_once_leave_what_one_leaves(folder_of_shards):
    chaos = shards.Chaos(folder_of_shards, seed=0)
    root = chaos.new("both")
    both = [shards.start(root, workers=2, seed=seed) for seed in (0, 1)]
    assert [command.wait(LONGEST) for command in both] == [0, 0]
    chaos.check(root)
