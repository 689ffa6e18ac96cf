"""Training is killed -9 at random steps and started again; the model may not differ by a bit.

    python -m tests.chaos.training --kills 20 --seed 0

    python -m tests.chaos.training --kills 20 --ray-train

A round trains one small model with 1, 2 or 4 workers, a checkpoint every few steps: on the Ray that
the command starts for itself, or, as on a cluster, under Ray Train. What is killed, at a random
step and a random instant after: a training worker (all of them start again), the driver alone, or
everything. A run that ended is started again. At the end of a
round the weights must equal those of an undisturbed training of as many workers, and every recorded
loss, by step, too; those of 1, 2 and 4 undisturbed workers may differ by rounding.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from pipeline.sharding import ingest, shard
from pipeline.storage import store
from pipeline.training import train
from schemas.settings import Recipe

KINDS = ("worker", "driver", "everything")
WORKERS = (1, 2, 4)
EVERY = 5  # steps between checkpoints
DEADLINE = 900  # seconds for one run, on a machine with much else to do


def recipe_of(workers: int) -> Recipe:
    return Recipe(
        name="chaos",
        source={"kind": "drawn", "train_images": 160, "val_images": 16, "test_images": 0},
        shard={"samples": 40},
        model={"width": 8, "dim": 32, "word_dim": 16, "image_size": 32},
        train={
            **{"epochs": 3, "batch_size": 32, "lr": 1e-3, "workers": workers, "log_every": 1},
            **{"checkpoint_every": EVERY, "max_failures": 20, "timeout": 60},
            "losses": {"info_nce": {"weight": 1.0}},
        },
    )


def drive(root: str, workers: int, ray_train: bool) -> None:
    """`halftone train` on a Ray with room for so many workers."""
    from jobs.cluster import tasks
    from jobs.cluster import training as ray_training

    tasks.start_here(workers + 1)
    if ray_train:
        tasks._own.clear()  # as if others had started it
    recipe = recipe_of(workers)
    plan = train.plan(recipe, root, "main")
    ray_training.train(train.fit, plan.pieces[0], recipe.train, lambda records: None)


def start(root: Path, workers: int, ray_train: bool) -> psutil.Popen:
    command = [sys.executable, "-m", "tests.chaos.training", "--drive", str(root)]
    command += ["--ray-train"] if ray_train else []
    with (root / "log.txt").open("ab") as log:
        return psutil.Popen(
            [*command, "--workers", str(workers)],
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        )


def step_of(root: Path) -> int:
    """The newest checkpoint's step; -1 before there is one."""
    found = sorted((root / "5-model/main/checkpoints").glob("step-*/checkpoint.json"))
    return int(found[-1].parent.name.removeprefix("step-")) if found else -1


@dataclass
class Outcome:
    """What a finished training left."""

    weights: dict[str, torch.Tensor]
    losses: list[tuple[int, float]]

    @classmethod
    def of(cls, root: Path) -> "Outcome":
        folder = root / "5-model/main"
        records = store.read_json(str(folder / "history.json"))["records"]
        losses = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
        return cls(load_file(folder / "model.safetensors"), losses)

    def against(self, other: "Outcome") -> str:
        """How it differs from the other, in words; empty where it does not."""
        steps = [step for step, _ in self.losses]
        if steps != [step for step, _ in other.losses]:
            return f"its losses are those of the steps {steps}"
        pairs = zip(self.losses, other.losses, strict=True)
        if parted := [mine for mine, its in pairs if mine != its]:
            return f"{len(parted)} losses differ, the first at step {parted[0][0]}"
        weights = [k for k in other.weights if not torch.equal(self.weights[k], other.weights[k])]
        return f"the weights {', '.join(weights)} differ" if weights else ""


class Chaos:
    """Rounds of kills, from one seed."""

    def __init__(self, folder: Path, seed: int, ray_train: bool):
        self.folder, self.random, self.ray_train = folder, random.Random(seed), ray_train
        self.rows: list[tuple] = []
        self.started: list[psutil.Process] = []
        data = folder / "data"
        recipe = recipe_of(1)
        for stage, make in ((ingest, ingest.write_part), (shard, shard.write_shard)):
            plan = stage.plan(recipe, str(data))
            plan.finish({piece.name: make(piece) for piece in plan.pending})
        self.expected = {workers: self.undisturbed(workers) for workers in WORKERS}
        self.steps = self.expected[1].losses[-1][0]

    def new(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "data", self.folder / name))

    def undisturbed(self, workers: int) -> Outcome:
        root = self.new(f"undisturbed-{workers}")
        running = start(root, workers, self.ray_train)
        self.started.append(running)
        assert running.wait(DEADLINE) == 0, (root / "log.txt").read_text()[-2000:]
        return Outcome.of(root)

    def round(self, number: int, workers: int, kinds: list[str]) -> None:
        """One training, killed at these kinds' random steps."""
        root = self.new(f"round-{number}")
        steps = sorted(self.random.randrange(self.steps - EVERY) for _ in kinds)
        planned = list(zip(steps, kinds, strict=True))
        while self._run(root, number, workers, planned) != 0:
            pass
        if differs := Outcome.of(root).against(self.expected[workers]):
            raise AssertionError(f"{root}: {differs}")

    def _run(self, root: Path, number: int, workers: int, planned: list) -> int:
        driver = start(root, workers, self.ray_train)
        self.started.append(driver)
        deadline = time.monotonic() + DEADLINE
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"{root}: no end; see log.txt"
            if planned and step_of(root) >= planned[0][0] - EVERY:
                time.sleep(self.random.random() / 5)
                if victims := self._victims(driver, planned[0][1]):
                    step, kind = planned.pop(0)
                    self.rows.append((number, workers, kind, step_of(root)))
                    for process in victims:
                        with_suppressed_kill(process)
            time.sleep(0.02)
        return driver.returncode

    def _victims(self, driver: psutil.Popen, kind: str) -> list[psutil.Process]:
        try:
            below = driver.children(recursive=True)
            self.started += [process for process in below if process not in self.started]
            named = "RayTrainWorker" if self.ray_train else "train, worker"
            training = [p for p in below if named in " ".join(p.cmdline()[:1])]
        except psutil.NoSuchProcess:
            return []
        if not training:
            return []
        return {
            "worker": [self.random.choice(training)],
            "driver": [driver],
            "everything": [driver, *below],
        }[kind]

    def end(self) -> None:
        for process in self.started:
            with_suppressed_kill(process)


def with_suppressed_kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def run(folder: Path, kills: int, seed: int, ray_train: bool) -> str:
    """The table of the kills, after every round ended as the undisturbed training did."""
    chaos = Chaos(folder, seed, ray_train)
    try:
        apart = max(
            float((chaos.expected[1].weights[k] - chaos.expected[w].weights[k]).abs().max())
            for w in WORKERS[1:]
            for k in chaos.expected[1].weights
        )
        kinds = list(itertools.islice(itertools.cycle(KINDS), kills))
        chaos.random.shuffle(kinds)
        for number, workers in enumerate(itertools.cycle(WORKERS), 1):
            if not kinds:
                break
            some = chaos.random.randint(1, 4)
            chaos.round(number, workers, kinds[:some])
            kinds = kinds[some:]
    finally:
        chaos.end()
    lines = ["kill round workers what        newest checkpoint"]
    for number, (round_, workers, kind, step) in enumerate(chaos.rows, 1):
        lines.append(f"{number:4} {round_:5} {workers:7} {kind:<10} {step:8} of {chaos.steps}")
    lines.append(
        f"{len(chaos.rows)} kills: every round ended with the undisturbed weights and losses, bit "
        f"for bit; 1, 2 and 4 workers differ by at most {apart:.1e} in a weight"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="processes to kill (count)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray-train", action="store_true", help="under Ray Train")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(options.drive, options.workers, options.ray_train)
    folder = Path(tempfile.mkdtemp(prefix="halftone-chaos-"))  # stays where a round fails
    print(run(folder, options.kills, options.seed, options.ray_train))
    return shutil.rmtree(folder)


if __name__ == "__main__":
    main()
