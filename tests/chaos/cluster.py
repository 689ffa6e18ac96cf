"""Nodes die, join, lose their cable or their disk while a job runs; the results may not differ.

    python -m tests.chaos.cluster                       # all rounds, about half an hour
    python -m tests.chaos.cluster --rounds kill disk

A round is `ray job submit … jobs.end_to_end --recipe drawn_tiny` on a head and two worker nodes in
namespaces of this machine, run folder on S3 (`tests/helpers/namespaces.py`), to which something
happens. Manifest, shards, embeddings and labels must be byte for byte those of one machine, metrics
the same, and what happened must be said in the job's log. A round that fails does not stop the
others.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from s3fs import S3FileSystem

from pipeline.storage import store
from tests.helpers.namespaces import HOME, ROOT, Machine, Namespaces, wait_for, why_not

RUN = (
    *("jobs.end_to_end", "--recipe", "drawn_tiny", "--encoder", "tfidf"),
    *("--shard.samples", "16", "--train.epochs", "12", "--train.timeout", "60"),
)
SAME_BYTES = ("1-manifest", "2-shards", "3-embeddings/tfidf", "4-relevance/tfidf")
TRAINING = "RayTrainWorker"  # how Ray Train names its workers
TOLD = ("lost", "again", "joined", "MLflow", "space")  # words of lines that tell what happened
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

    @property
    def workers(self) -> list[Machine]:
        """The nodes without the head."""
        return [node for node in self.cluster.nodes.values() if node is not self.cluster.head]

    def at_work(self, node: Machine, on: str) -> bool:
        """Whether a node runs a process whose name begins with this; Ray names them by task."""
        for process in node.inner.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{on}"):
                    return True
        return False

    def trainer(self) -> Machine:
        """A node, not the head, on which a worker of the training runs."""
        wait_for(lambda: any(self.at_work(n, TRAINING) for n in self.workers), "a trainer", 300)
        return next(node for node in self.workers if self.at_work(node, TRAINING))


def nothing(round: Round) -> None:
    """Nothing happens."""
    round.start()
    round.end()


def kill(round: Round) -> None:
    """A worker node is killed in shard, embed, label and train; a new one joins each time."""
    round.start()
    moments = {"shard": "1 ingest", "embed": "2 shard", "label": "3 embed", "train": "epoch 1/"}
    for stage, moment in moments.items():
        round.until(moment)
        victim = round.trainer() if stage == "train" else round.workers[-1]
        round.cluster.kill(victim)
        print(f"  {stage}: {victim.name} killed", flush=True)
        round.cluster.add_node()
    round.end()
    round.says("is lost")
    round.says("has joined")
    round.says("was lost")
    round.says("all start again from the newest checkpoint")


def join(round: Round) -> None:
    """All nodes but the head are killed; one that joins then is made use of by the training."""
    round.start()
    round.until("2 shard")
    for node in round.workers:
        round.cluster.kill(node)
    node = round.cluster.add_node()
    wait_for(lambda: round.at_work(node, "write_"), f"work on {node.name}", DEADLINE)
    wait_for(lambda: round.at_work(node, TRAINING), f"training on {node.name}", DEADLINE)
    round.end()
    round.says(f"{node.name} has joined")


def cut(round: Round) -> None:
    """A worker node's cable is out for 30 s while labels are made; then a trainer's."""
    round.start()
    for moment in ("3 embed", "epoch 1/"):
        round.until(moment)
        victim = round.trainer() if "epoch" in moment else round.workers[-1]
        round.cluster.cut(victim)
        print(f"  {moment}: {victim.name} cut off", flush=True)
        time.sleep(30)
        round.cluster.heal(victim)
    round.end()


def mlflow(round: Round) -> None:
    """The MLflow server dies in training and again after it, each time for half a minute."""
    server = round.cluster.start_mlflow()
    round.start(round.cluster.mlflow)
    for moment in ("epoch 1/", "5 train"):
        round.until(moment)
        for process in [*server.children(recursive=True), server]:
            process.kill()
        print(f"  {moment}: MLflow killed", flush=True)
        time.sleep(30)
        server = round.cluster.start_mlflow()
    round.end()
    round.says("what it lacks waits in")
    round.start(round.cluster.mlflow)
    round.end()
    pending = store.join(round.root, "tracking-pending.json")
    assert not store.exists(pending), "MLflow still lacks what was kept for it"


def disk(round: Round) -> None:
    """A worker node's disk is full from the start; its work is done by the others."""
    node = round.cluster.add_node(disk_mb=300)
    subprocess.run(node.inside("sh", "-c", f"cat /dev/zero > {HOME}/filler"), capture_output=True)
    round.start()
    round.end()
    round.says("No space left on device")


ROUNDS: dict[str, Callable[[Round], None]] = {
    f.__name__: f for f in (nothing, kill, join, cut, mlflow, disk)
}


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
                name: store.sha256(store.read_bytes(store.join(folder, stage, name)))
                for name in store.list_files(store.join(folder, stage))
                if not name.endswith(".html")  # they name their run folder
            }
            for folder in (root, other)
        )
        assert here == there, f"{stage} differs"
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            store.read_json(store.join(folder, stage, "main", "metrics.json"))["metrics"]
            for folder in (root, other)
        )
        assert here == there, f"{stage} differs: {here}, {there}"


def run(names: list[str], folder: Path) -> list[str]:
    """The rounds that failed."""
    expected = on_one_machine(folder)
    failed = []
    for name in names:
        with Namespaces(3) as cluster:
            os.environ.update(cluster.environment)
            S3FileSystem.clear_instance_cache()  # they keep the server of their first use
            round = Round(cluster, name)
            started = time.monotonic()
            try:
                ROUNDS[name](round)
                compare(round.root, expected)
                result = "same results"
            except AssertionError as error:
                failed.append(name)
                result = f"FAILED, {error}"
            print(f"{name}: {result}, {time.monotonic() - started:.0f} s; the log said")
            for line in round.text.splitlines():
                if line.startswith("  ") and any(word in line for word in TOLD):
                    print(f"    {line.strip()}", flush=True)
            shutil.copy(round.log, f"{tempfile.gettempdir()}/halftone-chaos-{name}.log")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="halftone-chaos-") as folder:
        failed = run(options.rounds, Path(folder))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
