"""The graded relevance that rankings are judged by: by which encoder, and of which pairs.

Legend of the shape suffixes: Q queries, B candidates of a span, M images, C captions of an image,
N captions, D width.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.errors import InputError
from pipeline.labels import embed
from pipeline.labels.caption_vectors import StoredCaptions, relevance_of
from pipeline.labels.encoders import encoder_label
from pipeline.retrieval.scores import Indices, Items
from pipeline.sharding.manifest.truth import facts_of
from pipeline.sources import source
from pipeline.storage import mapped, parquet, store
from pipeline.storage.mapped import LIMIT
from pipeline.storage.run_folder import Files, RunFolder, need_index
from schemas.settings import Recipe

SPAN = 2**16  # captions whose vectors are held at a time
ALL = slice(None)


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
    """Relevance of queries to candidates, by row: by the sentence encoder, and true if known.

    Sentence vectors are mapped from files of this machine, those of `SPAN` captions at a time.
    `items` are the ids of all images and captions of the split, which truth is known by.
    """

    def __init__(self, judge: Judge, items: Items, limit: float = LIMIT):
        self.recipe, self.items = judge.recipe, items
        self.encoder = self.recipe.embed.encoder
        self.facts = _facts(judge.truth, judge.truth_version) if judge.truth else None
        self.captions = stored_captions(judge.captions, limit)
        counts = len(self.captions.images), len(self.captions.captions)
        if counts != items.counts:
            there, here = (
                "{:,} images and {:,} captions".format(*n) for n in (counts, items.counts)
            )
            raise InputError(
                f"the sentence vectors in {judge.captions.folder} are of {there}, the model's of "
                f"{here}; run `halftone embed` and `halftone evaluate` again"
            )
        self._span: tuple = ()  # the last candidates, and their vectors

    def spans(self, direction: str) -> list[slice]:
        """All candidates, cut so that one part is of `SPAN` captions at most, about."""
        images, captions = self.items.counts
        count, size = captions, SPAN
        if direction == "t2i":
            count, size = images, max(1, SPAN * images // max(1, captions))
        return [slice(a, min(a + size, count)) for a in range(0, count, size)]

    def best_known(
        self, direction: str, rows_Q: Indices, span: slice | np.ndarray = ALL
    ) -> torch.Tensor:
        """Relevance (Q, B) to candidates, a span or rows: the true one where it is known."""
        found = self(direction, rows_Q, span)
        return found.get("ndcg_truth", found["ndcg_label"])

    def __call__(
        self, direction: str, rows_Q: Indices, span: slice | np.ndarray = ALL
    ) -> dict[str, torch.Tensor]:
        """Relevance (Q, B) of queries, by row, to candidates: those of a span, or some rows."""
        count, rows_Q = self.items.counts[direction == "i2t"], np.asarray(rows_Q, np.int64)
        candidates = np.arange(*span.indices(count)) if isinstance(span, slice) else span
        images, texts = (rows_Q, candidates) if direction == "i2t" else (candidates, rows_Q)
        if not self._span or not isinstance(span, slice) or self._span[0] != (direction, span):
            of_span = self.captions.vectors_of if direction == "i2t" else self.captions.of_images
            kept = (direction, span) if isinstance(span, slice) else None
            self._span = kept, of_span(candidates)
        vectors = self._span[1]
        vectors_MCD, mask_MC = self.captions.of_images(images) if direction == "i2t" else vectors
        texts_ND = vectors if direction == "i2t" else self.captions.vectors_of(texts)
        own_N = self.captions.images_of(texts)
        masks = {"mask_MC": mask_MC, "same_image_MN": torch.from_numpy(images[:, None] == own_N)}
        r_MN = relevance_of(vectors_MCD, texts_ND, self.recipe.label, **masks)
        graded = {"ndcg_label": self.captions.decide(r_MN, images, texts, self.recipe.label)}
        if self.facts is not None:
            sides = (("image", images), ("text", texts))
            known = [[self.facts[i] for i in self.items.ids_at(*side)] for side in sides]
            truth = source(self.recipe.source.kind).relevance(*known)
            graded["ndcg_truth"] = torch.from_numpy(np.asarray(truth, np.float32))
        return graded if direction == "i2t" else {name: r.T for name, r in graded.items()}

    def check(self, shard: str, images: range, texts: range) -> None:
        """Refuses sentence vectors of a shard that are of other captions than the model's."""
        for uri, name in zip(self.captions.uris, self.names, strict=True):
            if name == shard:
                table = parquet.read_columns(uri, ["caption_id", "image_id"])
                theirs = table["caption_id"].to_pylist(), [*dict.fromkeys(table[1].to_pylist())]
                sides = (("text", texts), ("image", images))
                if theirs != tuple(self.items.ids_at(*side) for side in sides):
                    raise InputError(
                        f"{uri} holds other captions than the model's vectors of {shard}, or in "
                        "another order; run `halftone embed` and `halftone evaluate` again"
                    )

    @property
    def names(self) -> list[str]:
        """Names of the shards that hold captions."""
        return [entry["name"] for entry in self.captions.entries]


@functools.lru_cache(maxsize=2)
def stored_captions(files: Files, limit: float = LIMIT) -> StoredCaptions:
    """The caption vectors of a split, mapped; how many images a shard has is counted once."""
    entries = [e for e in need_index(files.folder, "embed")["pieces"] if e["name"] in files.names]
    files = Files.of(files.folder, [entry for entry in entries if entry["captions"]])

    def counted() -> pa.Table:
        ids = (parquet.read_columns(uri, ["image_id"])["image_id"] for uri in files.uris)
        return pa.table({"images": pa.array([pc.count_distinct(i).as_py() for i in ids], "int64")})

    about = {"bytes": 0, "sha256": store.sha256(files.version.encode())}
    images = mapped.made(about, limit, "images-1", counted)["images"].to_pylist()
    return StoredCaptions(files, images, limit)


@functools.lru_cache(maxsize=1)
def _facts(folder: str, version: str) -> dict[str, str]:
    return facts_of(folder)
