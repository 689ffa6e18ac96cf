"""The graded relevance that rankings are judged by: by which encoder, and of which pairs.

Legend of the shape suffixes: Q queries, N candidates.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import encoder_label
from pipeline.sharding.manifest.truth import facts_of
from pipeline.sources import source
from pipeline.storage.run_folder import Files, RunFolder
from schemas.settings import Recipe


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
    return recipe.model_copy(update={"embed": embed.settings_of(encoder, recipe), "label": label})


@dataclass(frozen=True)
class Judge:
    """What graded relevance is made from."""

    recipe: Recipe  # with the judging encoder, and its map
    captions: Files  # of the evaluated split
    truth: str  # folder of the manifest where the true relevance is known, or ""
    truth_version: str


def judge_of(recipe: Recipe, root: str) -> Judge:
    """Who judges the evaluated split of a run folder."""
    judging = recipe_of_judge(recipe, root)
    captions = embed.files(judging, root).of_split(recipe.evaluate.split)
    manifest = RunFolder(root).index("ingest")
    known = any(name.startswith("truth") for e in manifest["pieces"] for name in e["files"])
    folder = RunFolder(root).folder("ingest")
    return Judge(judging, captions, folder if known else "", manifest["version"])


class GradedRelevance:
    """Relevance (Q, N) of queries to all candidates: by the sentence encoder, and true if known."""

    def __init__(self, judge: Judge):
        self.recipe = judge.recipe
        self.encoder = self.recipe.embed.encoder
        self.facts = _facts(judge.truth, judge.truth_version) if judge.truth else None
        self.captions = Captions.read(judge.captions)

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
            facts = [self.facts[i] for i in images], [self.facts[t] for t in texts]
            truth = source(self.recipe.source.kind).relevance(*facts)
            truth = torch.from_numpy(np.asarray(truth, np.float32))
            graded["ndcg_truth"] = truth if direction == "i2t" else truth.T
        return graded


@functools.lru_cache(maxsize=1)
def _facts(folder: str, version: str) -> dict[str, str]:
    return facts_of(folder)
