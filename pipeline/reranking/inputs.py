"""What re-ranking reads: tower vectors, and sentence vectors where those compare captions."""

import functools

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed
from pipeline.reranking.problem import Problem, of_vectors
from pipeline.retrieval.scores import Vectors
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.vector_columns import vector_matrix
from schemas.settings import Recipe, RerankSettings

NOBODY = Excluded()


def inputs_of(recipe: Recipe, root: str, name: str) -> tuple[dict, dict]:
    """Where the vectors of train, val and the evaluated split lie, and their versions."""
    tower_vectors.evaluated(recipe, root, name)
    split = recipe.evaluate.split
    of = vectors_of(recipe, root, name, ("train", "val", split))
    if not of["train"][0] and recipe.rerank.pool == "inductive":
        raise InputError(
            "re-ranking needs a bank of train queries; this run has no train split: take one that "
            "has, or --rerank.pool transductive"
        )
    inputs = {"vectors": of, "split": split, "rerank": recipe.rerank, "leaprr": recipe.leaprr}
    return inputs, {split: version for split, (_, version, _) in of.items()}


def vectors_of(recipe: Recipe, root: str, name: str, splits: tuple[str, ...]) -> dict:
    """URIs and version of each split's tower vectors, and the URIs of its sentence vectors."""
    folder = tower_vectors.vectors_folder(root, name)
    index = run_folder.need_index(folder, "evaluate")
    asked = recipe.rerank.texts == "sentences"
    sentences = run_folder.need_index(embed.folder_of(recipe, root), "embed") if asked else None
    found = {}
    for split in splits:
        entries = run_folder.of_split(index, split)
        names = [f"{entry['name']}.parquet" for entry in entries]
        version, others = run_folder.version(entries), ()
        if sentences is not None:
            own = [
                e for e in run_folder.of_split(sentences, split) if f"{e['name']}.parquet" in names
            ]
            version = store.fingerprint(version, run_folder.version(own))
            others = tuple(store.join(embed.folder_of(recipe, root), n) for n in names)
        found[split] = tuple(store.join(folder, n) for n in names), version, others
    return found


@functools.lru_cache(maxsize=4)
def _sentences(uris: tuple[str, ...], version: str) -> dict[str, np.ndarray]:
    """Sentence vectors by caption id."""
    tables = [parquet.read_table(uri, ["caption_id", "vector"]) for uri in uris]
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    ids = table["caption_id"].to_pylist()
    return dict(zip(ids, vector_matrix(table["vector"]), strict=True))


def bank_of(vectors: dict, settings: RerankSettings) -> Vectors | None:
    uris, version, _ = vectors["train"]
    return Vectors.read(uris, version).head(settings.bank_images) if uris else None


def bank_size(inputs: dict) -> int:
    bank = bank_of(inputs["vectors"], inputs["rerank"])
    return len(bank.image_ids) if bank else 0


def gallery_of(vectors: dict, split: str, leaving: Excluded) -> Vectors:
    uris, version, _ = vectors[split]
    return Vectors.read(uris, version).without(leaving)


def problem_of(
    vectors: dict, settings: RerankSettings, split: str, leaving: Excluded = NOBODY
) -> Problem | None:
    """A split as a problem with the train bank; None where the split is empty.

    With the split `train` the bank itself, to be dealt into galleries and banks.
    """
    bank = bank_of(vectors, settings)
    if not vectors[split][0]:
        return None
    parts = [(bank, "train")]
    if split != "train":
        parts = [(gallery_of(vectors, split, leaving), split), *([parts[0]] if bank else [])]
    sentences = None
    if settings.texts == "sentences":
        known = [(part, _sentences(vectors[s][2], vectors[s][1])) for part, s in parts]
        rows = [by_id[text_id] for part, by_id in known for text_id in part.text_ids]
        sentences = torch.from_numpy(np.stack(rows))
    return of_vectors(
        parts[0][0],
        parts[1][0] if len(parts) > 1 else None,
        sentences,
        pool=settings.pool,
        siblings=settings.siblings,
    )
