"""Sharding is killed -9 at random moments and started again; not a byte may differ in the end.

    python -m tests.chaos.shards --kills 20 --seed 0

A round shards one manifest into a new folder, by 1, 2 or 4 workers, the pieces in another order
each time. What is killed, at a random share of the shards done and a random instant after:

- task: a worker process in the middle of a shard; Ray tries again and the run goes on
- worker: any worker process of the raylet, busy or idle; the run goes on
- raylet: the node's manager; the run ends
- driver: the command alone; its workers may still write while the next run does
- everything: the command with all its processes

A run that ended is started again. At the end of a round every file must equal the undisturbed
run's, no other file may be there, and every sample of the manifest must be in the tars once.
"""

import argparse
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.sharding import ingest, shard
from pipeline.sharding.reading import Shards
from pipeline.storage import store
from schemas.settings import Recipe

KINDS = ("task", "worker", "raylet", "driver", "everything")
FATAL = ("raylet", "driver", "everything")
WORKERS = (1, 2, 4)
RECIPE = Recipe(
    name="chaos",
    source={"kind": "drawn", "train_images": 800, "val_images": 40, "test_images": 40},
    shard={"samples": 40},
)
SHARDS = 22
DEADLINE = 600  # seconds for one run, on a machine with much else to do


def drive(root: str, workers: int, seed: int) -> None:
    """`halftone shard`, with so many workers and the pieces in an order of this seed."""
    from jobs.cluster import tasks

    tasks.start_here(workers)
    plan = shard.plan(RECIPE, root)
    pieces = plan.pending
    random.Random(seed).shuffle(pieces)
    made = tasks.fan_out(shard.write_shard, pieces)
    shard.check(plan, made, RECIPE)
    plan.finish(made)


def start(root: Path, workers: int, seed: int) -> psutil.Popen:
    """The command that drives, in a process of its own."""
    command = [sys.executable, "-m", "tests.chaos.shards", "--drive", str(root)]
    command += ["--workers", str(workers), "--seed", str(seed)]
    with (root / "log.txt").open("ab") as log:
        return psutil.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])


def undisturbed(root: Path) -> dict[str, str]:
    """Shard the manifest here, one piece after the other; hashes of the files by name."""
    if (root / "2-shards" / "index.json").exists():
        return hashes(root)
    plan = ingest.plan(RECIPE, str(root))
    plan.finish({piece.name: ingest.write_part(piece) for piece in plan.pending})
    plan = shard.plan(RECIPE, str(root))
    plan.finish({piece.name: shard.write_shard(piece) for piece in plan.pending})
    return hashes(root)


def hashes(root: Path) -> dict[str, str]:
    return {f.name: store.sha256(f.read_bytes()) for f in (root / "2-shards").iterdir()}


def done(root: Path) -> dict[str, int]:
    """When each finished shard was finished (ns)."""
    return {f.name: f.stat().st_mtime_ns for f in (root / "2-shards").glob("*.parquet")}


@dataclass
class Kill:
    """One kill and what came of it."""

    round: int
    workers: int
    kind: str
    finished: int = 0  # shards that were there
    half: int = 0  # temporary files that were there: shards in the middle
    rewritten: int = 0  # of the finished ones, by the end of the round


@dataclass
class Chaos:
    """Rounds of kills, from one seed."""

    folder: Path
    seed: int
    kills: list[Kill] = field(default_factory=list)
    started: list[psutil.Process] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.expected = undisturbed(self.folder / "undisturbed")
        self.workers = itertools.cycle(WORKERS)

    def new(self, name: str) -> Path:
        """A run folder with the manifest alone."""
        return Path(
            shutil.copytree(
                self.folder / "undisturbed" / "1-manifest", self.folder / name / "1-manifest"
            )
        ).parent

    def round(self, number: int, kinds: list[str]) -> list[str]:
        """One sharding, disturbed by these kills; those that it ended too soon for."""
        root = self.new(f"round-{number}")
        moments = sorted(self.random.random() for _ in kinds)
        planned = list(zip(moments, kinds, strict=True))
        before = []
        while self._run(root, number, planned, before) != 0:
            pass
        for kill, finished in before:
            now = done(root)
            kill.rewritten = sum(now[name] != at for name, at in finished.items())
        self.check(root)
        return [kind for _, kind in planned]

    def _run(self, root: Path, number: int, planned: list, before: list) -> int:
        """Run the command, kill as planned; its exit code."""
        workers = next(self.workers)
        driver = start(root, workers, self.random.randrange(2**31))
        self.started.append(driver)
        deadline = time.monotonic() + DEADLINE
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"{root}: no end; see log.txt"
            if planned and len(done(root)) >= planned[0][0] * SHARDS:
                time.sleep(self.random.random() * 0.2)
                if victims := self._victims(driver, planned[0][1]):
                    _, kind = planned.pop(0)
                    kill = Kill(number, workers, kind)
                    self._kill(kill, victims, root, before)
            time.sleep(0.01)
        return driver.returncode

    def _victims(self, driver: psutil.Popen, kind: str) -> list[psutil.Process]:
        """What is to be killed; nothing while it is not there."""
        try:
            below = driver.children(recursive=True)
            self.started += [process for process in below if process not in self.started]
            names = {process: " ".join(process.cmdline()[:1]) for process in below}
        except psutil.NoSuchProcess:
            return []
        busy = [p for p, name in names.items() if name.startswith("ray::write_shard")]
        if not busy:
            return []
        return {
            "task": [self.random.choice(busy)],
            "worker": [self.random.choice([p for p in names if names[p].startswith("ray::")])],
            "raylet": [p for p, name in names.items() if name.endswith("/raylet")],
            "driver": [driver],
            "everything": [driver, *below],
        }[kind]

    def _kill(self, kill: Kill, victims: list, root: Path, before: list) -> None:
        for process in victims:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        finished = done(root)
        kill.finished = len(finished)
        kill.half = len(list((root / "2-shards").glob(f"{store.WRITING}*")))
        self.kills.append(kill)
        before.append((kill, finished))
        if kill.kind in FATAL:
            psutil.wait_procs(victims[:1], timeout=30)

    def check(self, root: Path) -> None:
        """The whole of what is promised."""
        found = hashes(root)
        assert found.keys() == self.expected.keys(), found.keys() ^ self.expected.keys()
        differ = [name for name in found if found[name] != self.expected[name]]
        assert not differ, differ
        manifest = ingest.read(str(root / "1-manifest"), ["image_id"])["image_id"].to_pylist()
        packed = Counter(sample["__key__"] for sample in Shards(str(root)).stream())
        assert packed == Counter(manifest)

    def end(self) -> None:
        """End what was started here and still runs."""
        for process in self.started:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def run(folder: Path, kinds: list[str], seed: int) -> list[Kill]:
    """The kills, one to four a round, after every round ended as the undisturbed run did."""
    chaos = Chaos(folder, seed)
    try:
        for number in itertools.count(1):
            if not kinds:
                return chaos.kills
            some = chaos.random.randint(1, 4)
            kinds = chaos.round(number, kinds[:some]) + kinds[some:]
    finally:
        chaos.end()


def table(kills: list[Kill]) -> str:
    lines = ["kill round workers what        shards done  in the middle  done and made again"]
    for number, k in enumerate(kills, 1):
        lines.append(
            f"{number:4} {k.round:5} {k.workers:7} {k.kind:<10} {k.finished:8} of {SHARDS}"
            f" {k.half:14} {k.rewritten:20}"
        )
    lines.append(
        f"{len(kills)} kills in {kills[-1].round} rounds: each round ended with the undisturbed "
        "run's files, byte for byte, and no others; no sample was lost, none is there twice"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="processes to kill (count)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(options.drive, options.workers, options.seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(options.kills)]
    random.Random(options.seed).shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="halftone-chaos-") as folder:
        print(table(run(Path(folder), kinds, options.seed)))
    return None


if __name__ == "__main__":
    main()
