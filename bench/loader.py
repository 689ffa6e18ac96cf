"""The loader in processes: its rate, and what it costs the training thread, as ratios in one run.

    python -m bench.loader [RUN [ROUNDS]]

RUN is a run folder with shards of pictures; without one, 1,500 drawn scenes of 224 pixels are made.
Nothing that was decoded is kept, as of a collection larger than memory. Ways take turns, ROUNDS
(default 5) times, and medians are told; on a machine with much else to do the ratios by CPU time
say what wall time cannot: a process that waits for a core decodes nothing.

Threads are those the loader had before: a pool of them in the training process.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import psutil
import torch

from pipeline.models import Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.sharding import ingest, shard
from pipeline.sharding.decoding import decode
from pipeline.training.data import Split
from pipeline.training.loading import loader as loading
from pipeline.training.loading.loader import Loader
from pipeline.training.sampler import Sampler
from schemas.settings import Recipe

SIZE, BATCH, BATCHES, STEPS = 224, 64, 8, 40
torch.set_num_threads(1)


def main(root: str, rounds: int) -> None:
    loading.KEPT_BYTES = 0
    split = Split(root, "train", preprocessing=Preprocessing.squash(SIZE), cache_mb=0)
    print(
        f"{len(split):,} pictures of {split.tar_bytes / len(split):,.0f} bytes at {SIZE} pixels, ",
        end="",
    )
    print(f"{loading.cores()} cores, load {os.getloadavg()[0]:.1f}, {rounds} rounds")
    rates(split, rounds)
    steps(split, rounds)


def rates(split: Split, rounds: int) -> None:
    """Pictures a second of processes and of threads, alone."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(rounds):
        for count in (1, 2):
            found.setdefault(f"{count} processes", []).append(of_processes(split, count))
            found.setdefault(f"{count} threads", []).append(of_threads(split, count))
    print(f"\n{'loader alone':<14}{'pictures/s':>11}{'a CPU second':>14}{'busy':>7}")
    middle = {}
    for way, runs in found.items():
        middle[way] = [statistics.median(column) for column in zip(*runs, strict=True)]
        wall, cpu, busy = middle[way]
        print(f"{way:<14}{wall:>11,.0f}{cpu:>14,.0f}{busy:>7.0%}")
    for what in ("processes", "threads"):
        one, two = middle[f"1 {what}"], middle[f"2 {what}"]
        print(f"two {what} ÷ one: {two[0] / one[0]:.2f} by the clock")
    one, two = middle["1 processes"], middle["2 processes"]
    print(
        f"and of processes {2 * two[1] / one[1] * two[2] / one[2]:.2f} were a core there for each"
    )


def of_processes(split: Split, count: int) -> tuple[float, float, float]:
    """Pictures a second, pictures a CPU second of the processes, and the share they were busy."""
    loader = loader_of(split, count)
    batches = forever(loader)
    next(batches)  # processes are up
    workers = [psutil.Process(pid) for pid in loader.pool.pids]
    loader.spent()
    before, started = cpu_of(workers), time.perf_counter()
    for _ in islice(batches, BATCHES * count):
        pass
    wall, cpu = time.perf_counter() - started, cpu_of(workers) - before
    busy, _ = loader.spent()
    loader.close()
    pictures = BATCH * BATCHES * count
    return pictures / wall, pictures / cpu, min(1.0, busy / wall)


def of_threads(split: Split, count: int) -> tuple[float, float, float]:
    cpu, started = time.process_time(), time.perf_counter()
    for _ in islice(by_threads(split, count), BATCHES * count):
        pass
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    pictures = BATCH * BATCHES * count
    return pictures / wall, pictures / cpu, min(1.0, cpu / wall / count)


def steps(split: Split, rounds: int) -> None:
    """Time of a step that is many small calls, as one on a GPU is, while batches are made."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        found.setdefault("nothing", []).append(step_time(iter(lambda: None, 0))[0])
        loader = loader_of(split, 1)
        taken = step_time(forever(loader))
        found.setdefault("1 process", []).append(taken[0])
        found.setdefault("handing out", []).append(taken[1])
        loader.close()
        threads = by_threads(split, 1)
        found.setdefault("1 thread", []).append(step_time(threads)[0])
        threads.close()
    middle = {way: statistics.median(runs) for way, runs in found.items()}
    handing = middle.pop("handing out")
    print(f"\n{'a step while batches are made by':<34}{'ms':>7}{'÷ nothing':>11}")
    for way, seconds in middle.items():
        print(f"{way:<34}{1e3 * seconds:>7.1f}{seconds / middle['nothing']:>11.2f}")
    print(f"handing out and taking a batch of {BATCH}: {1e3 * handing:.2f} ms of the thread's CPU")


def step_time(batches: Iterator) -> tuple[float, float]:
    """Median seconds of a step, and of the thread's own CPU time in getting a batch."""
    x = torch.zeros(64)
    taken, got = [], []
    next(batches)
    for _ in range(STEPS):
        cpu = time.thread_time()
        next(batches)
        got.append(time.thread_time() - cpu)
        started = time.perf_counter()
        for _ in range(4000):
            x = x + 1
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), statistics.median(got)


def loader_of(split: Split, workers: int) -> Loader:
    order = Sampler(split, batch_size=BATCH, lanes=8, pairs="caption", seed=0)
    words = Vocabulary.of(split.captions, min_count=1)
    return Loader(order, words, rank=0, size=1, max_words=64, workers=workers, epochs=1000)


def forever(loader: Loader) -> Iterator:
    for epoch in range(1000):
        yield from loader.epoch(epoch)


def by_threads(split: Split, count: int) -> Iterator:
    """Batches of a pool of threads, four ahead."""

    def images(rows: np.ndarray) -> list[np.ndarray]:
        return [decode(split.payload(row), Preprocessing.squash(SIZE)) for row in rows.tolist()]

    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(count) as pool:
        ahead: list[list] = []
        while True:
            while len(ahead) < 4:
                parts = np.array_split(rng.integers(0, len(split), BATCH), count)
                ahead.append([pool.submit(images, part) for part in parts])
            yield np.stack([image for part in ahead.pop(0) for image in part.result()])


def cpu_of(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def drawn(folder: str) -> str:
    """A run folder of 1,500 drawn scenes."""
    source = {"kind": "drawn", "train_images": 1500, "val_images": 0, "test_images": 0}
    recipe = Recipe(name="loader", source={**source, "image_size": SIZE})
    stages: tuple[tuple[object, Callable], ...] = (
        (ingest, ingest.write_part),
        (shard, shard.write_shard),
    )
    for stage, make in stages:
        plan = stage.plan(recipe, folder)  # type: ignore[attr-defined]
        plan.finish({piece.name: make(piece) for piece in plan.pending})
    return folder


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    else:
        with tempfile.TemporaryDirectory() as made:
            main(drawn(made), 5)
