"""What re-ranking reads: tower vectors, and sentence vectors where those compare captions."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed
from pipeline.reranking.problem import Problem, of_vectors
from pipeline.retrieval.scores import VectorScores
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import Files, RunFolder
from pipeline.storage.vector_columns import vector_matrix
from schemas.settings import Recipe, RerankSettings

NOBODY = Excluded()


class SplitVectors(NamedTuple):
    """A split's tower vectors, and its sentence vectors where those compare captions."""

    towers: Files
    sentences: Files | None

    @property
    def version(self) -> str:
        if self.sentences is None:
            return self.towers.version
        return store.fingerprint(self.towers.version, self.sentences.version)


def inputs_of(recipe: Recipe, root: str, name: str) -> tuple[dict, dict]:
    """The vectors of train, val and the evaluated split with the settings, and their versions."""
    split = recipe.evaluate.split
    of = vectors_of(recipe, root, name, ("train", "val", split))
    if not of["train"].towers and recipe.rerank.pool == "inductive":
        raise InputError(
            "re-ranking needs a bank of train queries; this run has no train split: take one that "
            "has, or --rerank.pool transductive"
        )
    inputs = {"vectors": of, "split": split, "rerank": recipe.rerank, "leaprr": recipe.leaprr}
    return inputs, {split: vectors.version for split, vectors in of.items()}


def vectors_of(
    recipe: Recipe, root: str, name: str, splits: tuple[str, ...]
) -> dict[str, SplitVectors]:
    """The vectors of a run folder's splits; sentence vectors of the same shards alone."""
    towers = RunFolder(root).files("evaluate", name, "vectors")
    towers.need(recipe.evaluate.split, "evaluate.split")
    asked = recipe.rerank.texts == "sentences"
    sentences = embed.files(recipe, root).only(towers.names) if asked else None
    return {
        split: SplitVectors(towers.of_split(split), sentences and sentences.of_split(split))
        for split in splits
    }


@functools.lru_cache(maxsize=4)
def _sentences(files: Files) -> dict[str, np.ndarray]:
    """Sentence vectors by caption id."""
    table = parquet.read_tables(files.uris, ["caption_id", "vector"])
    ids = table["caption_id"].to_pylist()
    return dict(zip(ids, vector_matrix(table["vector"]), strict=True))


def bank_of(vectors: dict[str, SplitVectors], settings: RerankSettings) -> VectorScores | None:
    """The first train images with their texts; None without a train split."""
    if not vectors["train"].towers:
        return None
    train = tower_vectors.read(vectors["train"].towers)
    count = min(settings.bank_images, len(train.items.image_ids))
    return train.take(*train.items.of_images(np.arange(count)))


def bank_size(inputs: dict) -> int:
    bank = bank_of(inputs["vectors"], inputs["rerank"])
    return len(bank.items.image_ids) if bank else 0


def problem_of(
    vectors: dict[str, SplitVectors],
    settings: RerankSettings,
    split: str,
    excluded: Excluded = NOBODY,
) -> Problem | None:
    """A split as a problem with the train bank; None where the split is empty.

    With the split `train` the bank itself, to be dealt into galleries and banks.
    """
    if not vectors[split].towers:
        return None
    bank = bank_of(vectors, settings)
    gallery, others = bank, None
    if split != "train":
        gallery, others = tower_vectors.without(vectors[split].towers, excluded), bank
    sentences = None
    if settings.texts == "sentences":
        rows: list[np.ndarray] = []
        for part, of in ((gallery, vectors[split]), (others, vectors["train"])):
            if part is not None:
                by_id = _sentences(of.sentences)
                rows += [by_id[text_id] for text_id in part.items.text_ids]
        sentences = torch.from_numpy(np.stack(rows))
    return of_vectors(gallery, others, sentences, pool=settings.pool, siblings=settings.siblings)
