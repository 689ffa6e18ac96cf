"""Peak memory of one shard's ranking task, by images, width and sentence width of the split.

    python -m bench.task_memory          # about three minutes
    python -m bench.task_memory label    # of a shard's lists, in splits of some sizes
    python -m bench.task_memory gallery FOLDER 1000000    # of a shard's rankings, in a large split

Made-up unit vectors, five captions an image, shards of 500 images, a bank of 2,000 images; plain
rankings, and those of inverted softmax. `pipeline/evaluation/task_memory.py` holds the figures a
number and a pair of a block that follow from the differences between rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.cluster.polling import meanwhile
from pipeline.evaluation import evaluate, task_memory
from pipeline.evaluation.graded_relevance import Judge
from pipeline.labels import label
from pipeline.reranking import rerank
from pipeline.reranking.inputs import SplitVectors
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet, run_folder, store, vector_columns
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import Files, RunFolder
from schemas.embedding import embedding_schema, tower_schema
from schemas.settings import Recipe

ROWS = ((1000, 256, 384), (5000, 256, 384), (5000, 1024, 384), (5000, 256, 1024))
BANK, SHARD = 2000, 500  # images


def unit(count: int, dim: int, seed: int = 0):
    """A column of unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def write_vectors(uri: str, split: str, images: int, dim: int, each: int = 5) -> dict:
    ids = [f"{split}-{i}" for i in range(images)]
    texts = [f"{i}#{k}" for i in ids for k in range(each)]
    columns = {
        "id": ids + texts,
        "image_id": ids + [text.split("#")[0] for text in texts],
        "modality": ["image"] * images + ["text"] * len(texts),
        "vector": vector_columns.vector_column(unit(images + len(texts), dim, len(uri) + images)),
    }
    table = pa.table(columns, schema=tower_schema(dim))
    return parquet.write_table(uri, table, "", {"images": images, "captions": len(texts)})


def write_sentences(uri: str, split: str, images: int, dim: int, each: int = 5) -> dict:
    ids = [f"{split}-{i}" for i in range(images) for _ in range(each)]
    columns = {
        "caption_id": [f"{id_}#{number % each}" for number, id_ in enumerate(ids)],
        "image_id": ids,
        "vector": vector_columns.vector_column(unit(len(ids), dim, 1).astype(np.float16)),
    }
    table = pa.table(columns, schema=embedding_schema(dim))
    return parquet.write_table(uri, table, "", {"captions": len(ids), "dim": dim})


def write_split(folder: str, split: str, sizes: list[int], dims: tuple[int, int], each=5) -> None:
    """Tower vectors, and sentence vectors, of shards of so many images."""
    for kind, write, dim in zip(
        ("towers", "sentences"), (write_vectors, write_sentences), dims, strict=True
    ):
        place, pieces = f"{folder}/{split}-{kind}", []
        for n, size in enumerate(sizes):
            name = f"{split}-{n:06d}"
            written = write(f"{place}/{name}.parquet", name, size, dim, each)
            pieces.append({**written, "name": name, "split": split})
        index = {"pieces": pieces, "version": run_folder.version(pieces)}
        store.write_json(f"{place}/index.json", index)


def files_of(folder: str) -> Files:
    return Files.of(folder, run_folder.need_index(folder, "evaluate")["pieces"])


def task(folder: str, scored: bool, images: int = SHARD, each: int = 5) -> Piece:
    recipe = Recipe(name="bench", source={"kind": "drawn"}, rerank={"bank_images": BANK})
    test, captions = files_of(f"{folder}/test-towers"), files_of(f"{folder}/test-sentences")
    scorer = None
    if scored:
        train = files_of(f"{folder}/train-towers")
        step = {"method": "inverted_softmax", "i2t": {"beta": 20.0}, "t2i": {"beta": 20.0}}
        scorer = rerank.Scorer(
            vectors=(("test", SplitVectors(test, None)), ("train", SplitVectors(train, None))),
            split="test",
            settings=recipe.rerank,
            steps=json.dumps([step]),
            weights=None,
            version="1",
        )
    inputs = {
        **{"vectors": test, "rows": [(0, images), (0, each * images)], "split": "test"},
        **{"judge": Judge(recipe, captions, "", ""), "recipe": recipe, "protocol": {}},
        **{"excluded": Excluded(), "scorer": scorer},
    }
    memory = task_memory.of_rankings(test, captions, recipe, scored)
    return Piece("part of a shard", f"{folder}/rankings.parquet", "1", inputs, memory)


def anonymous() -> float:
    """MB that this process holds, but for what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def measure(folder: str, scored: bool, images: int = SHARD, each: int = 5) -> None:
    piece, started = task(folder, scored, images, each), time.process_time()
    seen = [anonymous()]
    with meanwhile(lambda: seen.append(anonymous()), 0.003):
        (rerank if scored else evaluate).write_rankings(piece)
    way = "inverted softmax" if scored else "plain"
    a_query = 1000 * (time.process_time() - started) / (images * (1 + each))
    print(
        f"  {way:<16} {max(seen) - seen[0]:6.0f} MB, told {piece.memory / 1e6:.0f}; "
        f"{a_query:.1f} CPU ms a query",
        flush=True,
    )


def gallery(folder: str, images: int) -> None:
    """Of the rankings of 500 images and captions, one an image, among so many; D 256, 384."""
    if not Path(f"{folder}/test-sentences/index.json").exists():
        write_split(folder, "test", [10_000] * (images // 10_000), (256, 384), 1)
    for turn in ("first on the machine", "again"):
        print(f"{images:,} images, {turn}")
        measure(folder, False, SHARD, 1)
        os.remove(f"{folder}/rankings.parquet")


def lists(split: int, shard: int, dim: int) -> None:
    """Of a shard's lists in a split of so many captions."""
    recipe = Recipe(name="bench", embed={"encoder": "made-up"})
    with tempfile.TemporaryDirectory() as root:
        folder, pieces = RunFolder(root).folder("embed", "made-up"), []
        for n in range(split // shard):
            name = f"train-{n:06d}"
            ids = [f"{name}-{k}" for k in range(shard)]
            vectors = vector_columns.vector_column(unit(shard, dim, n).astype(np.float16))
            columns = {"caption_id": ids, "image_id": ids, "vector": vectors}
            table = pa.table(columns, schema=embedding_schema(dim))
            about = {"split": "train", "captions": shard, "dim": dim}
            written = parquet.write_table(f"{folder}/{name}.parquet", table, "1", about)
            pieces.append({**written, "name": name, "fingerprint": "1"})
        index = {"pieces": pieces, "version": run_folder.version(pieces)}
        store.write_json(f"{folder}/index.json", index)
        piece = label.plan(recipe, root).pieces[0]
        seen, started = [anonymous()], time.process_time()
        with meanwhile(lambda: seen.append(anonymous()), 0.003):
            label.write_relevance(piece)
        took, told = time.process_time() - started, piece.memory / 1e6
        row = f"{split:>9,} captions, {shard:>6,} a shard, D {dim}"
        print(
            f"{row}: {max(seen) - seen[0]:6.0f} MB, told {told:.0f}; {took:.1f} CPU s", flush=True
        )


LISTS = (
    (40_000, 10_000, 384),
    (160_000, 10_000, 384),
    (160_000, 40_000, 384),
    (160_000, 10_000, 64),
)


def main() -> None:
    if sys.argv[1:2] == ["label"]:
        if sys.argv[2:]:
            return lists(*map(int, sys.argv[2:]))
        for row in LISTS:
            command = [sys.executable, "-m", "bench.task_memory", "label", *map(str, row)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return None
    if sys.argv[1:2] == ["gallery"]:
        return gallery(sys.argv[2], int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--scored", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return measure(options.folder, options.scored)
    for images, dim, sentence_dim in ROWS:
        print(f"{images} images, D {dim}, sentences {sentence_dim}; above Python and torch:")
        with tempfile.TemporaryDirectory() as folder:
            write_split(folder, "test", [images], (dim, sentence_dim))
            write_split(folder, "train", [BANK], (dim, sentence_dim))
            own = {"OMP_NUM_THREADS": "1", "HALFTONE_CACHE": f"{folder}/cache"}
            for scored in ((), ("--scored",)):
                command = [sys.executable, "-m", "bench.task_memory", "--folder", folder, *scored]
                subprocess.run(command, check=True, env={**os.environ, **own})
                os.remove(f"{folder}/rankings.parquet")
    return None


if __name__ == "__main__":
    main()
