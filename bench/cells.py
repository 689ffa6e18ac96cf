"""Labelling a large split by cells: recall, memory of a task, bytes read, and time.

    python -m bench.cells 5000000 64 FOLDER    # captions, width; goes on where it was stopped

Made-up clustered vectors, one caption an image, shards of 10,000. Every piece is made in a process
of its own, one after the other, by `label`'s own plans; anonymous memory at the peak is counted
above what Python and torch hold. The last line is whole when all pieces were made in one run.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.task_memory import anonymous
from jobs.cluster.polling import meanwhile
from pipeline.labels import cells, label
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.vector_columns import vector_column
from schemas.embedding import embedding_schema
from schemas.settings import Recipe

SHARD = 10_000  # captions
TOPICS = 2_000  # around which captions lie, topics around some subjects
RECIPE = Recipe(name="bench", embed={"encoder": "made-up"}, label={"approximate_above": 1})


def vectors(shard: int, dim: int) -> np.ndarray:
    """Unit vectors of a shard: topics of unequal size around 50 subjects."""
    topic_rng, rng = np.random.default_rng(0), np.random.default_rng(shard + 1)
    subject = topic_rng.standard_normal((50, dim))[topic_rng.integers(50, size=TOPICS)]
    topics = subject + 0.8 * topic_rng.standard_normal((TOPICS, dim))
    share = 1 / np.arange(10, TOPICS + 10) ** 0.7
    chosen = topics[rng.choice(TOPICS, SHARD, p=share / share.sum())]
    out = chosen + 0.7 * rng.standard_normal((SHARD, dim))
    return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float16)


def embedded(root: str, captions: int, dim: int) -> None:
    """The embeddings of so many captions, as `embed` leaves them."""
    folder = RunFolder(root).folder("embed", "made-up")
    if run_folder.read_index(folder):
        return
    pieces = []
    for n in range(captions // SHARD):
        name = f"train-{n:06d}"
        ids = [f"{n}-{k}" for k in range(SHARD)]
        columns = {"caption_id": ids, "image_id": ids, "vector": vector_column(vectors(n, dim))}
        table = pa.table(columns, schema=embedding_schema(dim))
        about = {"split": "train", "captions": SHARD, "dim": dim}
        uri = store.join(folder, f"{name}.parquet")
        written = parquet.finished(uri, "1") or parquet.write_table(uri, table, "1", about)
        pieces.append({**written, "name": name, "fingerprint": "1"})
    index = {"pieces": pieces, "version": run_folder.version(pieces)}
    store.write_json(store.join(folder, "index.json"), index)


def apart(make, piece) -> tuple[dict, float, int]:
    """Summary of a piece made in a process of its own; MB at its peak, bytes it read of files."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        seen = [anonymous()]
        with meanwhile(lambda: seen.append(anonymous()), 0.01):
            summary = make(piece)
        read = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
        os.write(send, json.dumps([summary, max(seen) - seen[0], read]).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as answer:
        data = answer.read()
    os.waitpid(child, 0)
    return json.loads(data)


def main() -> None:
    captions, dim, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    embedded(root, captions, dim)
    total, largest, whole = 0, 0.0, captions * dim * 2
    for plan, make in label.steps(RECIPE, root):
        started, read, most, made = time.perf_counter(), 0, 0.0, {}
        pending = plan.pending
        with plan.log() as log:
            for piece in pending:
                made[piece.name], peak, of_piece = apart(make, piece)
                log.add(piece, made[piece.name])
                read, most = read + of_piece, max(most, peak)
        index = plan.finish(made)
        took = time.perf_counter() - started
        print(
            f"{store.name_of(plan.folder):<12}{len(pending):>6} of {len(plan.pieces)} pieces "
            f"{took:8.1f} s {most:6.0f} MB a task (told {plan.pieces[0].memory / 1e6:.0f}), "
            f"{read / whole:.2f} × the vectors read",
            flush=True,
        )
        total, largest = total + read, max(largest, most)
        for entry in index["pieces"][:1] if "recall" in plan.folder else ():
            print(f"{entry['asked']} captions: recall@64 {entry['recall']}")
    groups = store.read_json(store.join(plan.folder, "cells-train", "groups", "index.json"))
    records = sum(entry["read"] for entry in groups["pieces"])
    size = cells.record(dim).itemsize * captions
    print(f"{captions:,} × {dim}: {largest:.0f} MB, {total / whole:.2f} × the vectors read in all;")
    print(f"records of vectors {records / size:.2f} × by the groups")


if __name__ == "__main__":
    main()
