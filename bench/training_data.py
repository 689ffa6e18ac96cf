"""What a training worker holds of its data, and how long it takes to its first batch, by size.

    python -m bench.training_data make FOLDER IMAGES [CAPTIONS]
    python -m bench.training_data measure FOLDER IMAGES...

`make` writes sidecars and embeddings (384 wide), without pictures, in shards of 10,000 images with
CAPTIONS (1) captions each, as the stages write them; it goes on where it was stopped. `measure`
takes the first so many of them: a worker of one and of eight (8 lanes, batches of 1,024), each in a
process of its own, from nothing, again, and from the middle of an epoch on. Memory is what the
process holds at most above its imports, pages of mapped files among it; a batch is its rows, its
words and the vectors that a graded loss asks for. The node's cache is emptied before each start
from nothing (HALFTONE_CACHE is inside FOLDER); the kernel's own cache of files is not.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bench import peak_memory
from pipeline.labels.caption_vectors import StoredCaptions
from pipeline.models import Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder, contents
from pipeline.storage.vector_columns import vector_column
from pipeline.training.data import Split, word_counts
from pipeline.training.distributed import ProcessGroup
from pipeline.training.sampler import Sampler
from schemas.embedding import embedding_schema
from schemas.shard import SIDECAR

SHARD, DIM, POOL, WORDS = 10_000, 384, 10_000, 30_000
BATCH, LANES, STEPS = 1024, 8, 20
ENCODER = "random"


def make(folder: Path, images: int, captions: int) -> None:
    """Shards until there are so many images, beside those that are there."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lexicon = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(WORDS)]
    often = rng.zipf(1.2, (POOL, 9)) % WORDS  # few words are most of a text
    pool = pa.array([" ".join(lexicon[w] for w in row).capitalize() + "." for row in often])
    vectors = rng.normal(size=(SHARD * captions, DIM)).astype(np.float16)
    for number in range(-(-images // SHARD)):
        name = f"train-{number:06d}"
        entries = folder / f"{name}.json"
        if not entries.exists():
            entry = write_shard(folder, name, pool, captions, np.random.default_rng(number))
            made = write_vectors(folder, entry, vectors)
            entries.write_text(json.dumps({"shard": entry, "embed": made}))


def write_shard(folder: Path, name: str, pool: pa.Array, captions: int, rng) -> dict:
    """The sidecar of a shard, and its entry in the index."""
    count = SHARD * captions
    numbers = pa.array(np.arange(count)).cast(pa.string())
    joined = pc.binary_join_element_wise
    texts = joined(pool.take(pa.array(rng.integers(0, POOL, count))), numbers, " ")
    ids = joined(name, numbers, "#")
    fields = list(SIDECAR.field("captions").type.value_type)
    struct = pa.StructArray.from_arrays([ids, texts], fields=fields)
    offsets = pa.array(np.arange(0, count + 1, captions, dtype=np.int32))
    sizes = rng.integers(20_000, 60_000, SHARD)
    columns = {
        "image_id": joined(name, numbers.slice(0, SHARD), "/"),
        "captions": pa.ListArray.from_arrays(offsets, struct),
        "split": pa.array(["train"] * SHARD),
        "member": joined(name, numbers.slice(0, SHARD), "-"),
        "offset": pa.array(np.cumsum(sizes) - sizes + 512),
        "size": pa.array(sizes),
    }
    blank = {f.name: pa.nulls(SHARD, f.type) for f in SIDECAR if f.name not in columns}
    table = pa.table([(columns | blank)[f.name].cast(f.type) for f in SIDECAR], schema=SIDECAR)
    summary = {"split": "train", "samples": SHARD, "captions": count}
    summary |= {"images_with": {str(captions): SHARD}, "holds": {"nothing": SHARD}}
    summary |= {"files": {f"{name}.tar": {"bytes": 1, "sha256": "0" * 64}}, "contents": [name]}
    entry = parquet.write_table(f"{folder}/2-shards/{name}.parquet", table, "f", summary)
    return entry | {"name": name, "fingerprint": "f"}


def write_vectors(folder: Path, shard: dict, vectors: np.ndarray) -> dict:
    """Embeddings of a shard's captions, and their entry in the index."""
    name, captions = shard["name"], shard["captions"] // SHARD
    count = SHARD * captions
    numbers = pa.array(np.arange(count)).cast(pa.string())
    owners = pa.array(np.repeat(np.arange(SHARD), captions)).cast(pa.string())
    columns = {
        "caption_id": pc.binary_join_element_wise(name, numbers, "#"),
        "image_id": pc.binary_join_element_wise(name, owners, "/"),
        "vector": vector_column(np.roll(vectors, int(name[-6:]), axis=0)),
    }
    table = pa.table(columns, schema=embedding_schema(DIM))
    summary = {"split": "train", "captions": count, "dim": DIM}
    summary |= {"of": store.fingerprint(contents(shard))}
    uri = f"{folder}/3-embeddings/{ENCODER}/{name}.parquet"
    return parquet.write_table(uri, table, "f", summary) | {"name": name, "fingerprint": "f"}


def measure(folder: Path, images: int) -> None:
    """The figures of the first so many images."""
    root = folder / f"first-{images}"
    shutil.rmtree(root, ignore_errors=True)
    names = [f"train-{number:06d}" for number in range(images // SHARD)]
    known = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    for stage, inside in (("shard", "2-shards"), ("embed", f"3-embeddings/{ENCODER}")):
        (root / inside).mkdir(parents=True)
        for name in names:
            os.symlink(folder / inside / f"{name}.parquet", root / inside / f"{name}.parquet")
        index = {"pieces": [k[stage] for k in known], "version": "v", "settings": {}}
        store.write_json(str(root / inside / "index.json"), index)
    environment = {**os.environ, "HALFTONE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for size in (1, 8):
        for start in ("nothing", "again", "middle"):
            if start == "nothing":
                shutil.rmtree(folder / "cache", ignore_errors=True)
                shutil.rmtree(root / "5-model", ignore_errors=True)
            asked = [*("-m", "bench.training_data", "worker"), str(root), start, str(size)]
            subprocess.run([sys.executable, *asked], env=environment, check=True)
    shutil.rmtree(root)


def worker(root: str, start: str, size: int) -> None:
    """One worker of `size`: a line of figures."""
    torch.set_num_threads(1)
    base, begun, cpu = peak_memory.from_here(), time.perf_counter(), time.process_time()
    split = Split(root, "train", preprocessing=Preprocessing.squash(224), copies_gb=20.0)
    files = RunFolder(root).files("embed", ENCODER)
    captions = StoredCaptions(files, [entry["samples"] for entry in split.shards], 20e9)
    counted = time.perf_counter()
    vocabulary = Vocabulary.counted(word_counts(split, ProcessGroup()), min_count=2)
    counted = time.perf_counter() - counted
    order = Sampler(split, batch_size=BATCH, lanes=LANES, pairs="caption", seed=0)
    first = order.steps // 2 if start == "middle" else 0
    lanes = range(0, LANES, size)
    for number, (_, rows) in enumerate(order.epoch(0, first, lanes)):
        rows = rows.reshape(-1)
        vocabulary.encode(split.texts(rows), 64)
        captions.of_pairs(torch.from_numpy(rows))
        if number == 0:
            seconds, of_cpu = time.perf_counter() - begun, time.process_time() - cpu
            held, steps = peak_memory.peak() - base, time.process_time()
        if number == STEPS:
            break
    each = 1000 * (time.process_time() - steps) / STEPS
    print(
        f"{len(split):>11,} images, {len(split.captions):>11,} captions, a worker of {size}, "
        f"{start:>7}: first batch {seconds:6.2f} s ({of_cpu:6.2f} CPU; words {counted:6.2f}), "
        f"{held:5.0f} MB; after {STEPS} steps {peak_memory.peak() - base:5.0f} MB, "
        f"{each:5.1f} CPU ms a step",
        flush=True,
    )


def main(command: str, folder: str, *given: str) -> None:
    path = Path(folder).absolute()
    if command == "make":
        make(path, int(given[0]), int(given[1]) if len(given) > 1 else 1)
    elif command == "measure":
        for images in given:
            measure(path, int(images))
    else:
        worker(folder, given[0], int(given[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
