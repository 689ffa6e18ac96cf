"""Embeddings made by hand, and the relevance lists that follow from them."""

import numpy as np
import pyarrow as pa

from pipeline.labels import label
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.embedding import embedding_schema
from schemas.settings import Recipe
from tests.helpers.stages import finish

# Captions of each image of three shards: ragged, and more images than a shard's.
COUNTS = {"train-000000": [1, 3, 2], "train-000001": [5, 1], "train-000002": [2]}


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def embeddings(root: str, counts: dict[str, list[int]], dim=6, seed=0, twins=True) -> dict:
    """Embeddings by hand: random directions, a few of them the same; {caption_id: (image, v)}."""
    rng = np.random.default_rng(seed)
    folder = RunFolder(root).folder("embed", "hand")
    pieces, out = [], {}
    for name, of_images in counts.items():
        rows = []
        for number, count in enumerate(of_images):
            image = f"{name}/{number}"
            for k in range(count):
                vector = rng.normal(size=dim)
                if twins and out and rng.random() < 0.2:
                    vector = rng.choice([1, -1]) * next(iter(out.values()))[1]
                vector = (vector / np.linalg.norm(vector)).astype(np.float16)
                rows.append({"caption_id": f"{image}#{k}", "image_id": image, "vector": vector})
                out[f"{image}#{k}"] = (image, vector.astype(np.float64))
        table = pa.Table.from_pylist(rows, schema=embedding_schema(dim))
        summary = {"split": name.split("-")[0], "captions": len(rows), "dim": dim}
        written = parquet.write_table(f"{folder}/{name}.parquet", table, "hand", summary)
        pieces.append({**written, "name": name, "fingerprint": "hand"})
    store.write_json(
        f"{folder}/index.json", {"pieces": pieces, "version": run_folder.version(pieces)}
    )
    return out


def labelled(root: str, **how) -> list[dict]:
    """The relevance lists of all shards in order."""
    recipe = Recipe(name="t", embed={"encoder": "hand"}, label=how)
    plan = label.plan(recipe, root)
    finish(plan, label.write_relevance)
    return [row for piece in plan.pieces for row in parquet.read_table(piece.output).to_pylist()]
