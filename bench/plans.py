"""What plans of many shards cost, and what a finished folder costs that has nothing to do.

    python -m bench.plans                  # 2,000, 20,000 and 100,000 shards
    python -m bench.plans 2000

Indexes of made-up shards in a store in memory that counts what it is asked, as an object store is
asked: a listing is a request for every 1,000 files. Every size is a process of its own.
"""

import math
import resource
import subprocess
import sys
import time
from collections import Counter

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.labels import embed, label
from pipeline.sharding import shard
from pipeline.storage import piece_table
from pipeline.storage import store as files_at
from pipeline.storage.plan import Plan
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe

ROOT = "counted://bench/run"
RECIPE = Recipe(name="bench", source={"kind": "drawn"}, embed={"encoder": "tfidf"})
SIZES = (2_000, 20_000, 100_000)


class Counted(MemoryFileSystem):
    """A store in memory that counts what it is asked."""

    protocol = "counted"
    store: dict = {}
    pseudo_dirs = [""]
    asked: Counter = Counter()

    def ls(self, path, detail=True, **how):
        found = super().ls(path, detail=detail, **how)
        self.asked["LIST"] += max(1, math.ceil(len(found) / 1000))
        return found

    def info(self, path, **how):
        self.asked["HEAD"] += 1
        file = self.store.get(self._strip_protocol(path))
        return self._about(file, path) if file else super().info(path, **how)

    def _about(self, file, path) -> dict:
        """What `info` says of a file; it would look through all of them for a folder first."""
        return {"name": path, "size": file.size, "type": "file", "created": file.created}

    def cat_file(self, path, start=None, end=None, **how):
        self.asked["GET"] += 1
        return super().cat_file(path, start, end, **how)

    def pipe_file(self, path, value, **how):
        self.asked["PUT"] += 1
        return super().pipe_file(path, value, **how)


fsspec.register_implementation("counted", Counted)


def finish(plan: Plan, **summary) -> None:
    """The index of a plan whose pieces were made, and files of their names."""
    fs = fsspec.filesystem("counted")
    made = {}
    for number, piece in enumerate(plan.pieces):
        beside = [f"{piece.name}.tar"] if plan.stage == "shard" else []
        files = {}
        for name in (f"{piece.name}.parquet", *beside):
            files[name] = {"bytes": 1, "sha256": files_at.sha256(f"{name}{number}".encode())}
            MemoryFileSystem.pipe_file(fs, files_at.join(plan.folder, name), b"x")
        own = {"contents": [files[beside[0]]["sha256"], "x" * 64]} if beside else {}
        made[piece.name] = {"files": files, **own, **summary}
    plan.finish(made)


def measured(what: str, do):
    """What `do` returns; its seconds, memory and requests are printed."""
    Counted.asked.clear()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    out = do()
    took = time.process_time() - started
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    asked = ", ".join(f"{n} {kind}" for kind, n in sorted(Counted.asked.items()))
    print(f"  {what:<24}{took:7.2f} CPU s {more:7.0f} MB more at the peak; {asked}", flush=True)
    return out


def shards(count: int) -> None:
    """The indexes of a manifest and of so many shards."""
    run = RunFolder(ROOT)
    part = {"name": "part-00000", "files": {}, "splits": {"train": 10_000 * count}}
    files_at.write_json(files_at.join(run.folder("ingest"), "index.json"), {"pieces": [part]})
    from pipeline.storage.plan import Piece

    pieces = [
        Piece(f"train-{n:06d}", "", files_at.fingerprint("shard", n), {}) for n in range(count)
    ]
    follows = shard._follows(RECIPE, run)
    plan = Plan.of("shard", run.folder("shard"), pieces, RECIPE.shard.relevant(), follows)
    about = {"split": "train", "samples": 10_000, "captions": 10_000, "holds": {"jpg": 10_000}}
    finish(plan, **about, rejected={}, captions_rejected={})


def measure(count: int) -> None:
    print(f"{count:,} shards")
    measured("shards' index written", lambda: shards(count))
    about = {"split": "train", "captions": 10_000, "different": 10_000, "dim": 384}
    for step in steps():
        finish(step.plan, **about)
    plan = measured("label.plan", lambda: label.plan(RECIPE, ROOT))
    finish(plan, split="train", queries=20_000, recall={}, decided=0)
    del plan
    piece_table._stored.cache_clear()  # as in a process of its own
    started = time.perf_counter()
    measured("nothing to do: shard", lambda: nothing(shard.finished(RECIPE, ROOT)))
    measured("nothing to do: embed", lambda: [nothing(s.plan) for s in steps()])
    measured("nothing to do: label", lambda: nothing(label.plan(RECIPE, ROOT)))
    print(f"  all of it in {time.perf_counter() - started:.1f} s")


def steps():
    return embed.steps(RECIPE.embed, ROOT)


def nothing(plan: Plan) -> None:
    """What a stage asks of a plan, and tells of it."""
    assert plan.complete and len(plan) and plan.names


def main() -> None:
    if len(sizes := sys.argv[1:]) == 1:
        return measure(int(sizes[0]))
    for size in SIZES:
        subprocess.run([sys.executable, "-m", "bench.plans", str(size)], check=True)
    return None


if __name__ == "__main__":
    main()
