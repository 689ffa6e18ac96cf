"""Nodes die, join, lose their cable or their disk while a job runs; the results may not differ.

    python -m tests.chaos.cluster                       # all rounds, about half an hour
    python -m tests.chaos.cluster --rounds kill disk

A round is `ray job submit … jobs.end_to_end --recipe drawn_tiny` on a head and two worker nodes in
namespaces of this machine, run folder on S3 (`tests/namespaces.py`), to which something happens.
Manifest, shards, embeddings and labels must be byte for byte those of one machine, metrics the
same, and what happened must be said in the job's log.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline import _store
from tests.namespaces import HOME, ROOT, Namespaces, wait_for, why_not

RUN = (
    *("jobs.end_to_end", "--recipe", "drawn_tiny", "--encoder", "tfidf"),
    *("--shard.samples", "16", "--train.checkpoint_every", "4", "--train.timeout", "60"),
)
SAME_BYTES = ("1-manifest", "2-shards", "3-embeddings/tfidf", "4-relevance/tfidf")
DEADLINE = 1200  # seconds for one job, on a machine with much else to do


class Round:
    """A job on a cluster, its log, and what was done to it."""

    def __init__(self, cluster: Namespaces, name: str):
        self.cluster, self.root = cluster, f"{cluster.bucket}/{name}"
        self.log = cluster.folder / f"{name}.log"
        self.log.touch()
        self.job: psutil.Popen | None = None

    def start(self, mlflow: str = "") -> None:
        command = ("env", f"MLFLOW_TRACKING_URI={mlflow}", "python", "-m", *RUN)
        self.job = self.cluster.submit(*command, "--root", self.root, log=self.log)

    def until(self, words: str) -> None:
        """Return once the job's log holds these words."""

        def said() -> bool:
            assert self.job.poll() is None, f"the job ended before {words!r}: {self.text[-3000:]}"
            return words in self.text

        wait_for(said, repr(words), DEADLINE)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> None:
        assert self.job.wait(DEADLINE) == 0, self.text[-4000:]

    def says(self, words: str) -> None:
        assert words in self.text, f"{words!r} is not in the log: {self.text[-4000:]}"


def kill(round: Round) -> None:
    """A worker node is killed in shard, embed, label and train; a new one joins each time."""
    round.start()
    moments = {"shard": "1 ingest", "embed": "2 shard", "label": "3 embed", "train": "epoch 1/"}
    for stage, moment in moments.items():
        round.until(moment)
        victim = list(round.cluster.nodes.values())[-1]
        round.cluster.kill(victim)
        print(f"  {stage}: {victim.name} killed", flush=True)
        round.cluster.add_node()
    round.end()
    round.says("is lost")
    round.says("has joined")


def cut(round: Round) -> None:
    """A worker node's cable is out for 30 s while labels are made, and again in training."""
    round.start()
    victim = list(round.cluster.nodes.values())[-1]
    for moment in ("3 embed", "epoch 1/"):
        round.until(moment)
        round.cluster.cut(victim)
        time.sleep(30)
        round.cluster.heal(victim)
    round.end()


def mlflow(round: Round) -> None:
    """The MLflow server dies during training and is back half a minute later."""
    server = round.cluster.start_mlflow()
    round.start(round.cluster.mlflow)
    round.until("4 label")
    for process in [*server.children(recursive=True), server]:
        process.kill()
    time.sleep(30)
    round.cluster.start_mlflow()
    round.end()
    round.says("MLflow")


def disk(round: Round) -> None:
    """A worker node's disk is full from the start; its work is done by the others."""
    node = round.cluster.add_node(disk_mb=300)
    subprocess.run(node.inside("sh", "-c", f"cat /dev/zero > {HOME}/filler"), capture_output=True)
    round.start()
    round.end()
    round.says("No space left on device")


ROUNDS: dict[str, Callable[[Round], None]] = {f.__name__: f for f in (kill, cut, mlflow, disk)}


def on_one_machine(folder: Path) -> str:
    """The run folder of the same run without a cluster."""
    root = str(folder / "one-machine")
    environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "disabled"}
    environment["RAY_worker_niceness"] = "0"
    command = [sys.executable, "-m", *RUN, "--root", root]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return root


def compare(root: str, other: str) -> None:
    """Stops where two run folders hold different results."""
    for stage in SAME_BYTES:
        here, there = (
            {
                name: _store.sha256(_store.read_bytes(_store.join(folder, stage, name)))
                for name in _store.list_files(_store.join(folder, stage))
                if not name.endswith(".html")  # they name their run folder
            }
            for folder in (root, other)
        )
        assert here == there, f"{stage} differs"
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            _store.read_json(_store.join(folder, stage, "main", "metrics.json"))["metrics"]
            for folder in (root, other)
        )
        assert here == there, f"{stage} differs: {here}, {there}"


def run(names: list[str], folder: Path) -> None:
    expected = on_one_machine(folder)
    for name in names:
        with Namespaces(3) as cluster:
            os.environ.update(cluster.environment)
            round = Round(cluster, name)
            started = time.monotonic()
            ROUNDS[name](round)
            compare(round.root, expected)
            print(f"{name}: same results after {time.monotonic() - started:.0f} s; the log said")
            kept = ("lost", "again", "joined", "MLflow", "space")
            for line in round.text.splitlines():
                if line.startswith("  ") and any(word in line for word in kept):
                    print(f"    {line.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="halftone-chaos-") as folder:
        run(options.rounds, Path(folder))


if __name__ == "__main__":
    main()
