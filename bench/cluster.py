"""What Ray costs the data stages, and what a second worker gives, as ratios within one run.

    python -m bench.cluster                  # two cores to itself; about three minutes
    python -m bench.cluster --images 2000 --rounds 3

Drawn scenes are sharded, and their captions embedded by tfidf and labelled, by 2 workers: through
Ray (`jobs._cluster.fan_out`) and through a `multiprocessing` pool with the same functions, in turn;
both are started and warm. Then through Ray with 1 worker. Wall time, the best of a few rounds.
"""

import argparse
import contextlib
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs import _cluster
from pipeline import embed, ingest, label, shard
from schemas.settings import Recipe

STAGES = ("shard", "embed", "label")


def recipe_of(images: int) -> Recipe:
    source = {"kind": "drawn", "train_images": images, "val_images": 0, "test_images": 0}
    shards = {"samples": max(1, images // 16)}
    return Recipe(name="bench", source=source, shard=shards, embed={"encoder": "tfidf"})


def stages(recipe: Recipe, root: str, fan_out: Callable) -> dict[str, float]:
    """Seconds of every stage."""
    seconds = dict.fromkeys(STAGES, 0.0)
    for name in STAGES:
        for plan, make in _steps(name, recipe, root):
            started = time.perf_counter()
            made = fan_out(make, list(plan.pieces))
            seconds[name] += time.perf_counter() - started
            plan.finish(made)
    return seconds


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


def best(ways: dict[str, Callable], recipe: Recipe, manifest: Path, rounds: int) -> dict:
    """The fewest seconds of every stage by way, after a round that warms up."""
    out = {way: dict.fromkeys(STAGES, float("inf")) for way in ways}
    for turn in range(rounds + 1):
        for way, fan_out in ways.items():
            with tempfile.TemporaryDirectory() as root:
                shutil.copytree(manifest, Path(root) / manifest.name)
                took = stages(recipe, root, fan_out)
            if turn:
                out[way] = {name: min(out[way][name], took[name]) for name in STAGES}
    return out


@contextlib.contextmanager
def ray_with(workers: int):
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        _node_ip_address="127.0.0.1",
        object_store_memory=_cluster.OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="drawn scenes (count)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (count)")
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = recipe_of(options.images)
    if options.workers:
        return measure(options.workers, recipe, options.manifest, options.rounds)
    with tempfile.TemporaryDirectory() as root:
        plan = ingest.plan(recipe, root)
        plan.finish({piece.name: ingest.write_part(piece) for piece in plan.pieces})
        for workers in (2, 1):  # a process each: Ray starts once in one
            command = [sys.executable, "-m", "bench.cluster", "--manifest", plan.folder]
            command += ["--images", str(options.images), "--rounds", str(options.rounds)]
            subprocess.run([*command, "--workers", str(workers)], check=True)
    return None


def measure(workers: int, recipe: Recipe, manifest: Path, rounds: int) -> None:
    pool = multiprocessing.get_context("spawn").Pool(workers)
    with ray_with(workers), pool:
        ways = {"pool": through_pool(pool), "Ray": _cluster.fan_out}
        took = best(ways, recipe, manifest, rounds)
    for name in (*STAGES, "all"):
        of = {w: sum(t.values()) if name == "all" else t[name] for w, t in took.items()}
        each = f"Ray {of['Ray']:6.2f} s   pool {of['pool']:6.2f} s"
        print(f"{workers} workers  {name:<6} {each}   Ray {of['pool'] / of['Ray']:5.2f} × the pool")


if __name__ == "__main__":
    main()
