"""The graded relevance that rankings are judged by: by which encoder, and of which pairs.

Legend of the shape suffixes: Q queries, N candidates.
"""

import functools

import numpy as np
import torch

from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import encoder_label
from pipeline.sharding import ingest
from pipeline.sources import source
from pipeline.storage import run_folder, store
from schemas.settings import EmbedSettings, Recipe

MODEL = ("members", "revision", "prompt", "prompt_name")  # settings that belong to one encoder


def recipe_of_judge(recipe: Recipe, root: str) -> Recipe:
    """The recipe with the encoder, and the map, of graded evaluation in the place of the labels'.

    A map that is set or fitted to the cosines of one encoder gives way to clip under another. What
    people decided stays.
    """
    encoder = recipe.evaluate.encoder or next(
        iter(embed.other_sentence_encoders(recipe, root)), None
    )
    if encoder is None or encoder_label(encoder) == encoder_label(recipe.embed.encoder):
        return recipe
    label = recipe.label
    if label.map in ("logistic", "isotonic"):
        label = label.model_copy(update={"map": "clip", "calibration": None})
    return recipe.model_copy(update={"embed": settings_of(encoder, recipe), "label": label})


def settings_of(encoder: str, recipe: Recipe) -> EmbedSettings:
    """The settings under which another encoder than the recipe's embeds."""
    default = EmbedSettings().model_dump(include=set(MODEL))
    return recipe.embed.model_copy(update={**default, "encoder": encoder})


def inputs_of(recipe: Recipe, root: str) -> tuple[dict, list[dict]]:
    """What `GradedRelevance` reads for the evaluated split; the entries of the judge's vectors."""
    judged_by = recipe_of_judge(recipe, root)
    folder = embed.folder_of(judged_by, root)
    index = run_folder.need_index(folder, "embed")
    entries = run_folder.of_split(index, recipe.evaluate.split)
    manifest = run_folder.need_index(run_folder.folder(root, "ingest"), "ingest")
    knows_truth = any(n.startswith("truth") for e in manifest["pieces"] for n in e["files"])
    return {
        "judged_by": judged_by,
        "embeddings": tuple(store.join(folder, f"{e['name']}.parquet") for e in entries),
        "embeddings_version": run_folder.version(entries),
        "truth": run_folder.folder(root, "ingest") if knows_truth else "",
        "truth_version": manifest["version"],
    }, entries


class GradedRelevance:
    """Relevance (Q, N) of queries to all candidates: by the sentence encoder, and true if known."""

    def __init__(self, inputs: dict):
        self.recipe: Recipe = inputs["judged_by"]
        self.encoder = self.recipe.embed.encoder
        self.facts = _facts(inputs["truth"], inputs["truth_version"]) if inputs["truth"] else None
        self.captions = Captions.read(inputs["embeddings"], inputs["embeddings_version"])

    def best_known(self, direction: str, query_ids: list[str]) -> torch.Tensor:
        """Relevance (Q, N) to all candidates: the true one where it is known."""
        found = self(direction, query_ids)
        return found.get("ndcg_truth", found["ndcg_label"])

    def __call__(self, direction: str, query_ids: list[str]) -> dict[str, torch.Tensor]:
        captions, settings = self.captions, self.recipe.label
        if direction == "i2t":
            images, texts = query_ids, captions.caption_ids
            graded = {"ndcg_label": captions.relevance(images, settings)}
        else:
            row = {caption_id: i for i, caption_id in enumerate(captions.caption_ids)}
            images, texts = captions.image_ids, query_ids
            rows = [row[q] for q in query_ids]
            graded = {"ndcg_label": captions.relevance_of_texts(rows, settings)}
        if self.facts is not None:
            truth = source(self.recipe.source.kind).relevance(
                [self.facts[i] for i in images], [self.facts[t] for t in texts]
            )
            truth = torch.from_numpy(np.asarray(truth, np.float32))
            graded["ndcg_truth"] = truth if direction == "i2t" else truth.T
        return graded


@functools.lru_cache(maxsize=1)
def _facts(folder: str, version: str) -> dict[str, str]:
    return ingest.truth(folder)
