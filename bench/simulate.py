"""How long the stages take on up to 1,000 nodes that fail: a discrete-event simulation.

    python -m bench.simulate            the table of docs/scale.md
    python -m bench.simulate measure    runs here with one and two workers, against the simulation

Simulated are Ray's tasks as `jobs/cluster/tasks.py` hands them out (one after the other, to the
next free slot), nodes that are lost with the pieces in flight and come back, and a training that
stops as a whole and goes on from its newest checkpoint. How long a piece takes comes from the
rates of `jobs/cluster/rates.py`, what is assumed of failures from `Machines`.
"""

import heapq
import itertools
import math
import random
import sys
import tempfile
import time
from collections import deque
from typing import NamedTuple

from jobs.cluster.rates import TASK
from jobs.cluster.rates import of as rate
from pipeline.labels.label import task_memory
from schemas.settings import LabelSettings

START = 5.0  # seconds until a stage's workers have started; assumed
START_TRAIN = 15.0  # seconds until a training's have; 12 to 17 were seen


class Machines(NamedTuple):
    """Nodes that are alike; all but `nodes` and `slots` is assumed."""

    nodes: int
    slots: int  # pieces that run on a node at once
    hours_between_failures: float = math.inf  # of one node, exponentially distributed
    noticed: float = 30.0  # seconds until its pieces are handed out again
    replaced: float = 300.0  # seconds until another node is there


class Work(NamedTuple):
    """Pieces of a stage."""

    pieces: int
    seconds: float  # of a piece, on average
    spread: float = 0.1  # standard deviation over mean; lognormal


class Outcome(NamedTuple):
    """What came of it."""

    seconds: float
    busy: float  # share of all slots' time that made something
    failures: int
    redone: int  # pieces, or steps of a training


DONE, LOST, NOTICED, BACK = range(4)


def stage(work: Work, machines: Machines, seed: int = 0) -> Outcome:
    """The pieces of a data stage on nodes that fail."""
    rng = random.Random(seed)
    sigma = math.sqrt(math.log1p(work.spread**2))
    took = [
        work.seconds * rng.lognormvariate(-(sigma**2) / 2, sigma) if sigma else work.seconds
        for _ in range(work.pieces)
    ]
    waiting = deque(range(work.pieces))
    free = [node for _ in range(machines.slots) for node in range(machines.nodes)][::-1]
    life = [0] * machines.nodes  # times a node was replaced: what it did before does not count
    running: list[set[int]] = [set() for _ in range(machines.nodes)]
    events: list[tuple] = []  # (time, number, kind, node, its life, piece)
    number = itertools.count()

    def at(when: float, *what) -> None:
        heapq.heappush(events, (when, next(number), *what))

    failures = redone = done = 0
    now = driver = 0.0
    if machines.hours_between_failures < math.inf:
        for node in range(machines.nodes):
            at(_lifetime(rng, machines), LOST, node, 0, -1)
    while done < work.pieces:
        while waiting and free:
            node, piece = free.pop(), waiting.popleft()
            driver = max(driver, now) + rate("task")
            running[node].add(piece)
            at(driver + took[piece], DONE, node, life[node], piece)
        now, _, kind, node, born, piece = heapq.heappop(events)
        if kind == DONE and born == life[node]:
            running[node].discard(piece)
            free.append(node)
            done += 1
        elif kind == LOST and born == life[node]:
            failures += 1
            life[node] += 1
            redone += len(running[node])
            for lost in running[node]:
                at(now + machines.noticed, NOTICED, node, life[node], lost)
            running[node] = set()
            free = [other for other in free if other != node]
            at(now + machines.replaced, BACK, node, life[node], -1)
        elif kind == NOTICED:
            waiting.append(piece)
        elif kind == BACK:
            free += [node] * machines.slots
            at(now + _lifetime(rng, machines), LOST, node, life[node], -1)
    slots = machines.nodes * machines.slots
    return Outcome(START + now, sum(took) / max(now, 1e-9) / slots, failures, redone)


def training(
    steps: int, seconds: float, every: int, machines: Machines, restart: float = 60.0, seed: int = 0
) -> Outcome:
    """A training that loses what came after its newest checkpoint when any of its nodes is lost."""
    rng = random.Random(seed)
    now, done, failures, redone = START_TRAIN, 0, 0, 0
    hours = machines.hours_between_failures / machines.nodes
    while done < steps:
        until = rng.expovariate(1 / (3600 * hours)) if hours < math.inf else math.inf
        if (steps - done) * seconds <= until:
            now += (steps - done) * seconds
            break
        made = int(until / seconds)
        kept = (done + made) // every * every
        redone += done + made - kept
        failures += 1
        now += until + restart
        done = max(done, kept)
    return Outcome(now, steps * seconds / now, failures, redone)


def _lifetime(rng: random.Random, machines: Machines) -> float:
    return rng.expovariate(1 / (3600 * machines.hours_between_failures))


# ---- the table ---------------------------------------------------------------------------------

SHARD = 10_000  # pairs of a shard
PICTURE = 30_000  # bytes; assumed
DIM = 384
SPLITS = 100  # each labelled by itself
CORES, MEMORY_GB, GPUS = 32, 128, 8  # of a node
BATCH, PAIR_TFLOP, LINE = 32_768, 0.0143 * 3, 12.5e9  # CLIP ViT-B/32; 100 Gbit/s


def laion(nodes: int, hours_between_failures: float, seed: int = 0) -> dict[str, Outcome]:
    """The stages of 413 million pairs of one caption."""
    pairs = 413_000_000
    pieces, of_split = pairs // SHARD, pairs // SPLITS
    machines = Machines(nodes, CORES, hours_between_failures)
    packing = rate("shard") + rate("check") * PICTURE
    query = rate("label_query") + rate("label_pair") * DIM * of_split
    held = task_memory(LabelSettings(), SHARD, SHARD, DIM, of_split)
    fit = min(CORES, int(1e9 * MEMORY_GB / (TASK + held)))
    trainers = machines._replace(nodes=min(nodes, 64))
    step = BATCH / (trainers.nodes * GPUS) * PAIR_TFLOP / 100
    ring = 2 * 4 * 151_277_312 / LINE if trainers.nodes > 1 else 0.0
    return {
        "shard": stage(Work(pieces, SHARD * packing), machines, seed),
        "embed": stage(Work(pieces, SHARD * rate("embed")), machines, seed),
        "label": stage(Work(pieces, SHARD * query), machines._replace(slots=fit), seed),
        "train": training(pairs // BATCH, step + ring, 500, trainers, seed=seed),
    }


def table() -> None:
    print("LAION-400M: hours (pieces or steps made again after failures)\n")
    print("| nodes | hours between failures of a node | shard | embed | label | train |")
    print("|---|---|---|---|---|---|")
    for nodes in (1, 10, 100, 1000):
        for hours in (math.inf, 1000, 100):
            found = laion(nodes, hours)
            cells = [f"{o.seconds / 3600:.3g} ({o.redone:,})" for o in found.values()]
            often = "never" if hours == math.inf else f"{hours:,}"
            print(f"| {nodes:,} | {often} | {' | '.join(cells)} |")


# ---- against what is measured ------------------------------------------------------------------


def measure() -> None:
    """Shards of drawn scenes, made by Ray's tasks here, and the same simulated."""
    import ray

    from jobs.cluster import tasks

    print("| stage | workers | pieces | s a piece | spread | measured, s | simulated, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for workers in (1, 2):
        tasks.start_here(workers)
        for scenes in (300, 900):
            for name, took, wall in _run(scenes):
                mean = sum(took) / len(took)
                spread = math.sqrt(sum((t - mean) ** 2 for t in took) / len(took)) / mean
                found = stage(Work(len(took), mean, spread), Machines(1, workers))
                simulated = found.seconds - START
                row = f"| {name} | {workers} | {len(took)} | {mean:.3f} | {spread:.2f} "
                print(f"{row}| {wall:.2f} | {simulated:.2f} | {simulated / wall:.2f} |", flush=True)
        ray.shutdown()


def _run(scenes: int):
    """(stage, seconds of every piece, seconds of all) of sharding and embedding drawn scenes."""
    from pipeline.labels import embed
    from pipeline.sharding import ingest, shard
    from schemas.settings import Recipe

    source = {"kind": "drawn", "train_images": scenes, "val_images": 0, "test_images": 0}
    recipe = Recipe(name="s", source=source, shard={"samples": 50}, embed={"encoder": "trigrams"})
    with tempfile.TemporaryDirectory() as root:
        plan = ingest.plan(recipe, root)
        plan.finish({piece.name: ingest.write_part(piece) for piece in plan.pieces})
        plan = shard.plan(recipe, root)
        yield "shard", *_timed(plan, shard.write_shard)
        for step in embed.steps(recipe.embed, root):
            found = _timed(step.plan, step.make)
        yield "embed", *found


def _timed(plan, make) -> tuple[list[float], float]:
    from jobs.cluster import tasks

    def timed(piece):
        started = time.perf_counter()
        return {"summary": make(piece), "took": time.perf_counter() - started}

    tasks.fan_out(lambda piece: {"ready": bool(make)}, plan.pieces[:2])  # workers have started
    started = time.perf_counter()
    made = tasks.fan_out(timed, plan.pieces)
    wall = time.perf_counter() - started
    plan.finish({name: found["summary"] for name, found in made.items()})
    return [found["took"] for found in made.values()], wall


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else table()
