"""Stage 6, first half: the tower vectors of every shard."""

import functools

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.evaluation import task_memory
from pipeline.retrieval import tower_files
from pipeline.retrieval.scores import VectorScores
from pipeline.retrieval.stored import StoredVectors, stored
from pipeline.retrieval.stored_scores import StoredItems, StoredScores
from pipeline.sharding import exclusions
from pipeline.sharding.decoding import stream
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import cache, parquet, store
from pipeline.storage.mapped import LIMIT
from pipeline.storage.piece_table import at, column, split_names
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder, contents, of_split
from pipeline.storage.vector_columns import vector_column
from pipeline.training.saved_model import SavedModel, load_model
from schemas.embedding import tower_schema
from schemas.settings import Recipe

NOBODY = Excluded()
KIND = ("vectors", parquet.VECTORS)  # in the fingerprint of every shard's vectors


def plan_vectors(recipe: Recipe, root: str, name: str) -> Plan:
    """A piece for every shard of the evaluated split, of val, and of the train bank."""
    run = RunFolder(root)
    shards, model = run.index("shard"), run.index("train", name)
    folder = run.folder("evaluate", name, "vectors")
    entries = [*of_split(shards, recipe.evaluate.split)]
    if not any(entry["samples"] for entry in entries):
        known = ", ".join(sorted(split_names(shards["pieces"])))
        raise InputError(f"evaluate.split {recipe.evaluate.split!r} holds nothing; known: {known}")
    entries += [*of_split(shards, "val"), *bank_shards(shards, recipe.rerank.bank_images)]
    prompts = recipe.evaluate.prompts
    read_by = [list(prompts)] if prompts else []
    pieces = [
        Piece(
            name=entry["name"],
            output=store.join(folder, f"{entry['name']}.parquet"),
            fingerprint=store.fingerprint(*KIND, model["version"], contents(entry), *read_by),
            inputs={
                "tar": run.folder("shard", f"{entry['name']}.tar"),
                "file": entry["files"][f"{entry['name']}.tar"],
                "copies": recipe.train.cache_gb * 1e9,
                "split": entry["split"],
                "model": run.folder("train", name),
                "version": model["version"],
                "batch_size": recipe.evaluate.batch_size,
                "prompts": prompts,
            },
            memory=task_memory.of_vectors(entry, recipe, model),
        )
        for entry in {entry["name"]: entry for entry in entries if entry["samples"]}.values()
    ]
    return Plan.of("vectors", folder, pieces, {})


def notes(index: dict, split: str) -> dict[str, str]:
    """What is worth a word of the split's captions, from the vectors' index."""
    entries = of_split(index, split)
    cut, captions = (sum(e.get(of, 0) for e in entries) for of in ("cut_captions", "captions"))
    return {"cut_captions": f"{cut:,} of {captions:,}"} if cut else {}


def told(recipe: Recipe, root: str, name: str) -> list[str]:
    """A sentence where the texts are read by other prompts than the model's own."""
    own = RunFolder(root).index("train", name)["pieces"][0].get("recipe", {})
    prompts = list((own.get("evaluate") or {}).get("prompts", []))
    if prompts == list(recipe.evaluate.prompts):
        return []
    reads = (
        f"reads texts as {', '.join(map(repr, prompts))}" if prompts else "reads them as they are"
    )
    return [
        f"texts are read by evaluate.prompts here and in search; the model in MLflow, and "
        f"load_model without prompts, {reads}, as when it was made"
    ]


def files(root: str, name: str, split: str) -> Files:
    """The tower vectors that a model's evaluation left, of a split."""
    return RunFolder(root).files("evaluate", name, "vectors").of_split(split)


def evaluated(recipe: Recipe, root: str, name: str) -> Files:
    """The evaluated split's vectors, or a sentence that names the splits."""
    vectors = RunFolder(root).files("evaluate", name, "vectors")
    return vectors.need(recipe.evaluate.split, "evaluate.split")


@functools.lru_cache(maxsize=4)
def read(found: Files, limit: float = LIMIT, excluded: Excluded = NOBODY) -> StoredScores:
    """Vectors of a split, of all that is not excluded: files of this machine, made once, mapped.

    `limit` is what all files that are kept on it may take (bytes).
    """
    images, texts = tower_files.items(found, excluded, limit)
    sides = (side(found, of, limit, excluded) for of in ("image", "text"))
    return StoredScores.of_files(StoredItems(images, texts), *sides)


def side(
    found: Files,
    of: str,
    limit: float = LIMIT,
    excluded: Excluded = NOBODY,
    cells: int = 0,
) -> StoredVectors:
    """The vectors of a split's images ("image") or texts ("text"), in order or by cells."""
    return stored(tower_files.source(found, of, excluded, limit), limit, cells=cells)


def without(found: Files, excluded: Excluded, limit: float = LIMIT) -> StoredScores:
    """Vectors of a split, of all that is not excluded."""
    return read(found, limit, excluded)


def read_vectors(models: list[tuple[str, Recipe]], root: str) -> VectorScores:
    """Vectors of the evaluated split, by the one model (name, settings) of a run folder."""
    if len(models) != 1:
        names = ", ".join(name for name, _ in models) or "no model"
        raise InputError(f"{root} holds {names}; name one with --name, or other vectors")
    [(name, recipe)] = models
    found = evaluated(recipe, root, name)
    return without(found, exclusions.of_evaluation(recipe.evaluate, found))


def bank_shards(shards: dict, images: int) -> list[dict]:
    """The first train shards that hold so many images (train shards are in random order)."""
    train = of_split(shards, "train")
    before = np.cumsum([0, *column(train, "samples")])[:-1]
    return [*at(train, np.flatnonzero(before < images))]


@functools.lru_cache(maxsize=1)
def _model(folder: str, version: str, prompts: tuple[str, ...]) -> SavedModel:
    return load_model(folder, prompts)


def write_vectors(piece: Piece) -> dict:
    """Write the tower vectors of one shard; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    model = _model(inputs["model"], inputs["version"], inputs["prompts"])
    together = inputs["batch_size"]
    tar = cache.kept(inputs["tar"], inputs["file"], inputs["copies"])
    samples = list(stream(tar, model.preprocessing))
    images = [about["image_id"] for about, _ in samples]
    captions = [(c, about["image_id"]) for about, _ in samples for c in about["captions"]]
    vectors = [
        model.embed_payloads([payload for _, payload in samples], together),
        model.embed_texts([caption["text"] for caption, _ in captions], together),
    ]
    matrix = torch.cat(vectors).numpy()
    table = pa.table(
        {
            "id": images + [caption["caption_id"] for caption, _ in captions],
            "image_id": images + [image_id for _, image_id in captions],
            "modality": ["image"] * len(images) + ["text"] * len(captions),
            "vector": vector_column(matrix),
        },
        schema=tower_schema(matrix.shape[1]),
    )
    summary = {"split": inputs["split"], "images": len(samples), "captions": len(captions)}
    if cut := model.cut_texts([caption["text"] for caption, _ in captions]):
        summary["cut_captions"] = cut
    return parquet.write_table(piece.output, table, piece.fingerprint, summary)
