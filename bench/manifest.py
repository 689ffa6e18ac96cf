"""What a manifest costs the command and its tasks until its rows are dealt out to shards.

    python -m bench.manifest FOLDER 1000000 10000000        # so many rows, one after the other
    python -m bench.manifest FOLDER 1000000 --workers 4 --kills 5

In FOLDER, which takes some 0.6 kB a row and is emptied after: a manifest in parts of 100,000 rows,
a caption of 55 characters each, all of one small picture. Then the check of ids and the dealing out
as `halftone ingest` and `halftone shard` do them, on a Ray of so many workers. Peaks are of this
process above its imports; CPU is of all processes. With kills, the command is ended with all its
processes (-9) so many times, at moments drawn from a seed, and goes on.

`hash` is of all shards' names and fingerprints, which stand for every row and its place.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from bench import peak_memory
from pipeline.sharding import ingest, shard
from pipeline.sharding.manifest import contents, unique
from pipeline.sharding.manifest.spans import Manifest
from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import RunFolder
from schemas.manifest import GIVEN, MANIFEST
from schemas.settings import Recipe

PART = 100_000  # rows
TEXT = "a brown dog runs through the tall green grass, "


def write(root: str, count: int) -> None:
    """The manifest's parts and its index."""
    folder = RunFolder(root).folder("ingest")
    pieces, made = [], {}
    for number, start in enumerate(range(0, count, PART)):
        rows = _rows(start, min(count, start + PART))
        name = f"part-{number:05d}"
        piece = Piece(name, store.join(folder, f"{name}.parquet"), "f", {})
        summary = {
            "part": name,
            "splits": {"train": len(rows)},
            "contents": [contents.digest(rows)],
        }
        pieces.append(piece)
        made[name] = parquet.write_table(piece.output, rows, "f", summary)
    Plan.of("ingest", folder, pieces, {"kind": "csv"}).finish(made)


def _rows(start: int, end: int) -> pa.Table:
    count = end - start
    ids = [f"image-{n:09d}" for n in range(start, end)]
    texts = [f"{TEXT}{n:08d}" for n in range(start, end)]
    captions = pa.StructArray.from_arrays(
        [pa.array([f"{id_}#0" for id_ in ids]), pa.array(texts), pa.nulls(count, pa.string())],
        fields=list(GIVEN),
    )
    columns = {
        "image_id": ids,
        "uri": [f"/data/pictures/{id_}.jpg" for id_ in ids],
        "split": ["train"] * count,
        "captions": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), captions),
        "source": ["csv"] * count,
        "stamp": [f"[1000, {n}]" for n in range(start, end)],
    }
    for name in ("width", "height", "sha256", "problem"):
        columns[name] = pa.nulls(count, MANIFEST.field(name).type)
    return pa.table({name: columns[name] for name in MANIFEST.names}, schema=MANIFEST)


def deal(root: str, workers: int, told) -> None:
    """What `ingest` and `shard` do until the shards' tasks could begin; figures to `told`."""
    from jobs.cluster import tasks

    tasks.start_here(workers)
    recipe, run = Recipe(name="b", source={"kind": "csv"}), RunFolder(root)
    manifest = Manifest.of(run.folder("ingest"), run.index("ingest")["pieces"])
    before = peak_memory.from_here()
    if manifest.is_large:
        if not Path(root, "checked").exists():
            for plan, make in unique.steps(manifest, "csv"):
                plan.finish(tasks.fan_out(make, plan.pending))
            unique.check(manifest, "csv")
            Path(root, "checked").touch()
        checked = _cpu()
        for plan, make in shard.steps(recipe, root):
            if make is not shard.write_shard:
                plan.finish(tasks.fan_out(make, plan.pending))
    else:
        unique.check_rows(ingest.images(manifest.folder), np.arange(manifest.rows), manifest)
        checked = _cpu()
        plan = shard.plan(recipe, root)
    hashed = store.fingerprint([(piece.name, piece.fingerprint) for piece in plan.pieces])
    told.send((checked, _cpu(), peak_memory.peak() - before, _largest(), len(plan.pieces), hashed))


def _tasks() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.name().startswith("ray::")]


def _cpu() -> float:
    """CPU seconds of this process and of Ray's workers."""
    times = [p.cpu_times() for p in [psutil.Process(), *_tasks()]]
    return sum(t.user + t.system for t in times)


def _largest() -> float:
    """The most memory that a worker has held (MB)."""
    peaks = [0]
    for process in _tasks():
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return max(peaks) / 1e3


def measured(root: str, workers: int, kills: int, seed: int) -> tuple:
    """The figures of the last of the commands, after so many were killed."""
    drawn, patience = random.Random(seed), 2.0
    while True:
        here, there = multiprocessing.get_context("spawn").Pipe()
        command = multiprocessing.get_context("spawn").Process(
            target=deal, args=(root, workers, there)
        )
        command.start()
        wait = drawn.uniform(6, 6 + patience) if kills else None
        if here.poll(wait):
            found = here.recv()
            command.join()
            return found
        below = psutil.Process(command.pid).children(recursive=True)
        os.kill(command.pid, signal.SIGKILL)
        for process in below:
            with_no_one(process)
        command.join()
        kills, patience = kills - 1, patience + 2
        left = sorted(f.name for f in Path(root, "2-shards/rows").glob("*/*.runs"))
        print(f"  killed after {wait:.1f} s; {len(left)} files of runs are there", flush=True)


def with_no_one(process: psutil.Process) -> None:
    """End a process that may be gone."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for count in options.rows:
        root = os.path.join(options.folder, f"manifest-{count}")
        write(root, count)
        for workers in options.workers:
            store.remove(f"{root}/2-shards")
            store.remove(f"{root}/checked")
            start = time.monotonic()
            figures = measured(root, workers, options.kills, options.seed)
            checked, all_, driver, largest, shards, hashed = figures
            print(
                f"{count:>11,} rows {workers} workers: ids {checked / count * 1e6:5.2f}, dealt "
                f"{(all_ - checked) / count * 1e6:5.2f} µs of CPU a row; driver {driver:5.0f} MB "
                f"more, largest task {largest:5.0f} MB in all; {shards:,} shards, {hashed}, "
                f"{time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
