"""What Ray costs the data stages, and what a second worker gives, as ratios within one run.

    python -m bench.cluster                  # two cores to itself; about five minutes
    python -m bench.cluster --images 2000 --rounds 3
    python -m bench.cluster --tasks 10000    # what the driver spends on tasks that do nothing

Drawn scenes are sharded, and their captions embedded by tfidf and labelled, by 2 workers and by 1:
through Ray (`jobs.cluster.tasks.fan_out`) and through a `multiprocessing` pool with the same
functions, all started and warm, a thread a worker. Every round goes through all four, and every
ratio is of one round: what else the machine does falls on both. Wall time, and CPU time of all
processes with Ray's own, which other work changes less; medians over the rounds, and quartiles of
ratios.
"""

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# Ray's workers would be at niceness 15, and lose to whatever else runs.
os.environ.update({"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"})

from jobs.cluster import tasks
from pipeline.labels import embed, label
from pipeline.sharding import ingest, shard
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import Files
from schemas.settings import Recipe

STAGES = ("shard", "embed", "label")
RATIOS = (
    ("Ray × the pool, 2 workers", ("pool", 2), ("Ray", 2)),
    ("Ray × the pool, 1 worker", ("pool", 1), ("Ray", 1)),
    ("1 → 2 workers, Ray", ("Ray", 1), ("Ray", 2)),
    ("1 → 2 workers, pool", ("pool", 1), ("pool", 2)),
)


def recipe_of(images: int) -> Recipe:
    source = {"kind": "drawn", "train_images": images, "val_images": 0, "test_images": 0}
    shards = {"samples": max(1, images // 16)}
    return Recipe(name="bench", source=source, shard=shards, embed={"encoder": "tfidf"})


def stages(recipe: Recipe, root: str, fan_out: Callable) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of every stage, and of all."""
    took = {}
    for name in STAGES:
        wall = cpu = 0.0
        for plan, make in _steps(name, recipe, root):
            pieces, before, started = list(plan.pieces), cpu_seconds(), time.perf_counter()
            made = fan_out(make, pieces)
            wall += time.perf_counter() - started
            cpu += cpu_seconds() - before
            plan.finish(made)
        took[name] = wall, cpu
    return {**took, "all": tuple(sum(both) for both in zip(*took.values(), strict=True))}


_known: dict[psutil.Process, float] = {}  # CPU seconds of processes, also of those that ended


def cpu_seconds() -> float:
    """Of this process and all below it, Ray's among them, so far."""
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            _known[process] = sum(process.cpu_times()[:2])
    return sum(_known.values())


def _steps(name: str, recipe: Recipe, root: str):
    if name == "embed":
        yield from ((step.plan, step.make) for step in embed.steps(recipe.embed, root))
    elif name == "shard":
        yield shard.plan(recipe, root), shard.write_shard
    else:
        yield label.plan(recipe, root), label.write_relevance


def through_pool(pool) -> Callable:
    def fan_out(make, pieces):
        made = pool.imap_unordered(_made, [(make, piece) for piece in pieces])
        return dict(made)

    return fan_out


def _made(work: tuple) -> tuple[str, dict]:
    make, piece = work
    return piece.name, make(piece)


@contextlib.contextmanager
def ray_with_two():
    import ray

    # While one CPU is taken Ray ends the worker that is idle: the next round's would be cold.
    tasks.start_here(2, _system_config={"idle_worker_killing_time_threshold_ms": 10**9})
    yield
    ray.shutdown()


@contextlib.contextmanager
def one_taken():
    """One of Ray's two CPUs is reserved, for nothing."""
    from ray.util import placement_group, remove_placement_group

    reserved = placement_group([{"CPU": 1}])
    assert reserved.wait(60)
    yield
    remove_placement_group(reserved)


def measure(recipe: Recipe, manifest: Path, rounds: int) -> dict[tuple, list[dict]]:
    """Seconds of every stage by (way, workers), a round each, after one that warms up."""
    start = multiprocessing.get_context("spawn").Pool
    with ray_with_two(), start(2) as two, start(1) as one:
        ways = {
            ("pool", 2): (through_pool(two), contextlib.nullcontext),
            ("Ray", 2): (tasks.fan_out, contextlib.nullcontext),
            ("pool", 1): (through_pool(one), contextlib.nullcontext),
            ("Ray", 1): (tasks.fan_out, one_taken),
        }
        took: dict[tuple, list[dict]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            order = list(ways) if turn % 2 else list(reversed(ways))
            for way in order:
                fan_out, beside = ways[way]
                with tempfile.TemporaryDirectory() as root, beside():
                    shutil.copytree(manifest, Path(root) / manifest.name)
                    took[way].append(stages(recipe, root, fan_out))
    return {way: times[1:] for way, times in took.items()}


def nothing(piece: Piece) -> dict:
    return {"made": piece.name}


def driver(count: int) -> None:
    """CPU and memory of the driver that hands out tasks as of `label`, which do nothing."""
    names = tuple(f"train-{n:06d}" for n in range(count))
    recipe = recipe_of(1)
    common = {"embeddings": Files("/nowhere", names, "1"), "settings": recipe.label}
    pieces = [Piece(name, f"/nowhere/{name}", name, {**common, "shard": name}) for name in names]
    with ray_with_two():
        tasks.fan_out(nothing, pieces[:100])
        me, seen, freed = psutil.Process(), [], ctypes.CDLL(None).malloc_trim
        before, started, ended = sum(me.cpu_times()[:2]), time.perf_counter(), 0

        def done(*_) -> None:
            nonlocal ended
            ended += 1
            if ended % (count // 5) == 0:
                held = me.memory_info().rss / 2**20
                freed(0)  # what is free and was not given back to the system is not held
                seen.append((held, me.memory_info().rss / 2**20))

        tasks.fan_out(nothing, pieces, done=done)
        cpu, wall = sum(me.cpu_times()[:2]) - before, time.perf_counter() - started
    held = ", ".join(f"{there:.0f} ({used:.0f})" for there, used in seen)
    print(f"{count:,} tasks: {1e3 * cpu / count:.2f} ms of the driver's CPU a task, {wall:.1f} s")
    print(f"MB it held after each fifth (and without what was free): {held}")


def ratio(above: list[dict], below: list[dict], name: str, of: int, share: float = 1.0) -> str:
    """Median and quartiles of the rounds' ratios of a stage, of wall (0) or CPU (1) time."""
    rounds = zip(above, below, strict=True)
    found = [share * a[name][of] / b[name][of] for a, b in rounds]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else 3 * found
    return f"{middle:4.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="drawn scenes (count)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (count)")
    parser.add_argument("--tasks", type=int, help="that do nothing, instead (count)")
    options = parser.parse_args()
    if options.tasks:
        return driver(options.tasks)
    recipe = recipe_of(options.images)
    with tempfile.TemporaryDirectory() as root:
        plan = ingest.plan(recipe, root)
        plan.finish({piece.name: ingest.write_part(piece) for piece in plan.pieces})
        took = measure(recipe, Path(plan.folder), options.rounds)
    print(f"{options.images} images, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name in (*STAGES, "all"):
        for of, time_ in enumerate(("wall", "CPU")):
            medians = (
                f"{way} {workers}: {statistics.median(times[name][of] for times in rounds):.2f}"
                for (way, workers), rounds in took.items()
            )
            print(name, time_, "s:", "  ".join(medians))
            for what, above, below in RATIOS:
                share = 0.5 if of == 0 and above[1] != below[1] else 1.0
                print(f"    {what}: {ratio(took[above], took[below], name, of, share)}")
    return None


if __name__ == "__main__":
    main()
