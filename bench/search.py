"""Search among made-up vectors of any number: how long it starts, how long a query takes, memory.

python -m bench.search make FOLDER [--images 1000000] [--dim 256] [--captions 1]
python -m bench.search measure FOLDER [--above 3000000] [--queries 200] [--threads 2]

`make` writes a run folder without pictures: sidecars and tower vectors of shards of 10,000 images
(unit vectors of 2,000 topics, a caption near to its image), by the stages' own writers. `measure`
starts in a process of its own, twice: the first makes this machine's files, the second finds them.
Queries are captions' vectors given as the model would, one after the other; words too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bench import peak_memory
from pipeline.models.words import terms
from pipeline.search.index import Query, SearchIndex
from pipeline.storage import parquet, run_folder, store, vector_columns
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import tower_schema
from schemas.manifest import CAPTION
from schemas.settings import Recipe
from schemas.shard import SIDECAR

SHARD, TOPICS, NEAR = 10_000, 2000, 0.6
WORDS = 20_000  # of captions: the n-th is as frequent as 1 / n


def make(folder: str, images: int, dim: int, captions: int) -> None:
    run, rng = RunFolder(folder), np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, dim), np.float32)
    places = run.folder("shard"), run.folder("evaluate", "main", "vectors")
    pieces: tuple[list, list] = [], []
    for first in range(0, images, SHARD):
        name, count = f"test-{first // SHARD:06d}", min(SHARD, images - first)
        about = {"split": "test", "samples": count, "images": count, "captions": count * captions}
        tables = _sidecar(rng, first, count, captions), _towers(rng, topics, first, count, captions)
        for place, made, table in zip(places, pieces, tables, strict=True):
            written = parquet.write_table(f"{place}/{name}.parquet", table, "1", about)
            made.append({**written, "name": name, "fingerprint": "1"})
    for place, made in zip(places, pieces, strict=True):
        index_ = {"pieces": made, "version": run_folder.version(made)}
        store.write_json(f"{place}/index.json", index_)


def _sidecar(rng, first: int, count: int, captions: int) -> pa.Table:
    drawn = (WORDS ** rng.random((count * captions, 9))).astype(int)
    words = pa.array([f"w{n}" for n in range(WORDS + 1)])
    texts = pc.binary_join_element_wise(*(words.take(pa.array(of)) for of in drawn.T), " ")
    ids = [f"i{first + n}" for n in range(count)]
    of_texts = [f"{id_}#{k}" for id_ in ids for k in range(captions)]
    made = pa.StructArray.from_arrays([pa.array(of_texts), texts], fields=list(CAPTION))
    ends = pa.array(np.arange(count + 1, dtype=np.int32) * captions)
    names = [f"{first + n:09d}" for n in range(count)]
    columns = {
        "image_id": pa.array(ids),
        "key": pa.array(names),
        "captions": pa.ListArray.from_arrays(ends, made),
        "split": pa.array(["test"] * count),
        "member": pa.array([f"{name}.jpg" for name in names]),
        "offset": pa.array(np.zeros(count, np.int64)),
        "size": pa.array(np.zeros(count, np.int64)),
        "sha256": pa.array([f"{name:>064}" for name in names]),
    }
    nulls = {f.name: pa.nulls(count, f.type) for f in SIDECAR if f.name not in columns}
    return pa.table({f.name: (columns | nulls)[f.name] for f in SIDECAR}).cast(SIDECAR)


def _towers(rng, topics: np.ndarray, first: int, count: int, captions: int) -> pa.Table:
    dim = topics.shape[1]
    images = topics[rng.integers(0, TOPICS, count)]
    images = images + NEAR * rng.standard_normal((count, dim), np.float32)
    texts = np.repeat(images, captions, 0)
    texts = texts + NEAR * rng.standard_normal(texts.shape, np.float32)
    vectors = np.concatenate([images, texts])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"i{first + n}" for n in range(count)]
    owners = [id_ for id_ in ids for _ in range(captions)]
    columns = {
        "id": ids + [f"{id_}#{n % captions}" for n, id_ in enumerate(owners)],
        "image_id": ids + owners,
        "modality": ["image"] * count + ["text"] * len(owners),
        "vector": vector_columns.vector_column(vectors),
    }
    return pa.table(columns, schema=tower_schema(dim))


class Model:
    """Gives each text the vector that its number stands for."""

    def __init__(self, vectors_QD: torch.Tensor):
        self.vectors_QD = vectors_QD

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self.vectors_QD[[int(text) for text in texts]]


def measure(folder: str, above: int, queries: int, threads: int) -> dict:
    """Of one process: seconds until it can answer, CPU ms and wall ms of a query, memory (MB)."""
    torch.set_num_threads(threads)
    before, wall, cpu = peak_memory.from_here(), time.perf_counter(), time.process_time()
    recipe = Recipe(
        name="bench", source={"kind": "drawn"}, search={"approximate_above": above, "shades": False}
    )
    gallery = SearchIndex(recipe, folder, "main")
    gallery.prepare()
    out = {"start_s": time.perf_counter() - wall, "start_cpu_s": time.process_time() - cpu}
    out |= gallery.about_query(Query("0"))
    rows = np.linspace(0, len(gallery.texts) - 1, queries).astype(int)
    places = rows if gallery.texts.row is None else np.argsort(gallery.texts.row.numpy())[rows]
    gallery.__dict__["_model"] = Model(gallery.texts.vectors[torch.as_tensor(places)].clone())
    asked = [Query(str(n), top=24, shades=False) for n in range(queries)]
    words = [terms(c.text)[0] for c in gallery.pictures.captions_at(rows)]
    filtered = [Query(str(n), top=24, words=word) for n, word in enumerate(words)]
    together = [asked[n : n + 32] for n in range(0, queries, 32)]
    kinds = {"alone": [[q] for q in asked], "of_32": together, "filtered": [[q] for q in filtered]}
    gallery.find_all(together[0])
    for kind, batches in kinds.items():
        took, cpu = [], time.process_time()
        for batch in batches:
            started = time.perf_counter()
            gallery.find_all(batch)
            took.append(1000 * (time.perf_counter() - started))
        out[f"{kind}_cpu_ms"] = 1000 * (time.process_time() - cpu) / queries
        out[f"{kind}_p50_ms"], out[f"{kind}_p99_ms"] = np.quantile(took, [0.5, 0.99]).tolist()
    out["own_first"] = np.mean(
        [
            h[0].row == c.image
            for h, c in zip(
                gallery.find_all(asked), gallery.pictures.captions_at(rows), strict=True
            )
        ]
    )
    lines = Path("/proc/self/status").read_text().splitlines()
    of = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    out |= {"anonymous_mb": of["RssAnon:"], "mapped_mb": of["RssFile:"], "before_mb": before}
    if gallery.probes(gallery.images):  # the whole truth, beside what the halves say
        found = gallery.find_all(asked)
        gallery.__dict__["probes"] = lambda vectors: 0
        exact = gallery.find_all(asked)
        same = [
            len({h.row for h in a[:10]} & {h.row for h in b[:10]}) / 10
            for a, b in zip(found, exact, strict=True)
        ]
        out["recall_here"] = float(np.mean(same))
    return out | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "measure", "once"))
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--above", type=int, default=3_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    folder = store.absolute(options.folder)
    if options.what == "make":
        return make(folder, options.images, options.dim, options.captions)
    if options.what == "once":
        found = measure(folder, options.above, options.queries, options.threads)
        return print(
            json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()})
        )
    command = [sys.executable, "-m", "bench.search", "once", *sys.argv[2:]]
    for turn in ("first", "again"):
        print(turn, subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return None


if __name__ == "__main__":
    main()
