"""Stage 4: caption similarity becomes relevance, the top candidates of every query.

Image→text and text→image lists over the captions and images of the query's own split.
"""

import functools

import numpy as np
import pyarrow as pa
import torch

from pipeline import _plan, _store, embed
from pipeline._plan import Piece, Plan
from pipeline.formulas import relevance
from schemas.relevance import RELEVANCE
from schemas.settings import LabelSettings, Recipe

BLOCK = 256  # query images per matrix product: BLOCK × C × N floats are held at a time
BINS = 50  # of the relevance histograms


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard: its images and captions against all of their split."""
    embeddings = _plan.need_index(embed.folder_of(recipe, root), "embed")
    encoder = embed.encoder_label(recipe.embed.encoder)
    folder = _plan.folder(root, "label", encoder)
    settings = recipe.label.model_dump()
    pieces = []
    for entry in embeddings["pieces"]:
        others = _plan.of_split(embeddings, entry["split"])
        uris = [_plan.folder(root, "embed", encoder, f"{e['name']}.parquet") for e in others]
        version = _plan.version(others)
        pieces.append(
            Piece(
                name=entry["name"],
                output=_store.join(folder, f"{entry['name']}.parquet"),
                fingerprint=_store.fingerprint("label", settings, entry["name"], version),
                inputs={
                    "embeddings": tuple(uris),
                    "shard": uris[[e["name"] for e in others].index(entry["name"])],
                    "version": version,
                    "split": entry["split"],
                    "settings": recipe.label,
                },
            )
        )
    return _plan.plan("label", folder, pieces, settings)


def write_relevance(piece: Piece) -> dict:
    """Write the relevance lists of one shard; a summary with histograms of the relevance."""
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    settings: LabelSettings = piece.inputs["settings"]
    everyone = Captions.read(piece.inputs["embeddings"], piece.inputs["version"])
    queries = Captions.read((piece.inputs["shard"],), piece.fingerprint)
    rows, others, own = [], np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for start in range(0, len(queries.image_ids), BLOCK):
        images = queries.image_ids[start : start + BLOCK]
        vectors_MCD, mask_MC = queries.vectors_MCD(images), queries.mask(images)
        r_QN = everyone.relevance(vectors_MCD, settings, mask_MC=mask_MC)
        same_QN = everyone.same_image(images)
        others += _histogram(r_QN[~same_QN])
        own += _histogram(queries.held_out(images, settings))
        rows += _top("i2t", images, r_QN, same_QN, settings.top_k)
    for start in range(0, len(queries.caption_ids), BLOCK):
        part = slice(start, start + BLOCK)
        r_NM = everyone.relevance_of_texts(queries.vectors[part], settings)
        same_NM = everyone.images_are(queries.caption_image[part])
        rows += _top("t2i", queries.caption_ids[part], r_NM, same_NM, settings.top_k)
    summary = {
        "split": piece.inputs["split"],
        "queries": len(rows),
        "histogram_negatives": others.tolist(),
        "histogram_positives": own.tolist(),
    }
    table = pa.Table.from_pylist(rows, schema=RELEVANCE)
    return _store.write_table(
        piece.output,
        table,
        piece.fingerprint,
        summary,
        map=settings.map,
        reduce=settings.reduce,
        embeddings=piece.inputs["version"],
    )


def calibration(entries: list[dict]) -> dict:
    """Histograms, by split, of the relevance of annotated negatives and of held-out positives.

    A held-out positive is a caption against the *other* captions of its own image.
    """
    out = {}
    for split in sorted({entry["split"] for entry in entries}):
        mine = [entry for entry in entries if entry["split"] == split]
        names = ("histogram_negatives", "histogram_positives")
        out[split] = {name: np.sum([e[name] for e in mine], axis=0).tolist() for name in names}
    return {"edges": np.linspace(0, 1, BINS + 1).tolist(), "splits": out}


class Captions:
    """The caption vectors of a split, or of a shard, grouped by image, in shard order."""

    def __init__(self, table: pa.Table):
        self.caption_ids: list[str] = table["caption_id"].to_pylist()
        self.caption_image: list[str] = table["image_id"].to_pylist()
        self.vectors = torch.from_numpy(embed.vector_matrix(table["vector"]))
        self.image_ids: list[str] = list(dict.fromkeys(self.caption_image))
        self.image_row = {image_id: row for row, image_id in enumerate(self.image_ids)}
        self.image_of = np.array([self.image_row[i] for i in self.caption_image], np.int64)
        starts = np.searchsorted(self.image_of, np.arange(len(self.image_ids) + 1))
        self.first, self.count = starts[:-1], np.diff(starts)

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def read(uris: tuple[str, ...], version: str) -> "Captions":
        """Read once per process: `version` tells apart what the same files held at other times."""
        tables = [_store.read_table(uri).replace_schema_metadata() for uri in uris]
        return Captions(pa.concat_tables(tables))

    def captions_of(self, images: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Caption rows (M, C) of M images, and a mask (M, C) of those that are real."""
        rows = np.array([self.image_row[i] for i in images], np.int64)
        step = np.arange(self.count[rows].max(initial=1))
        real = step[None, :] < self.count[rows][:, None]
        return torch.from_numpy(self.first[rows][:, None] + step * real), torch.from_numpy(real)

    def vectors_MCD(self, images: list[str]) -> torch.Tensor:
        return self.vectors[self.captions_of(images)[0]]

    def mask(self, images: list[str]) -> torch.Tensor:
        return self.captions_of(images)[1]

    def relevance(self, image_captions_MCD, settings: LabelSettings, *, mask_MC) -> torch.Tensor:
        """Relevance (M, N) of images, given by their captions, to all the captions here."""
        return graded(image_captions_MCD, self.vectors, settings, mask_MC=mask_MC)

    def relevance_of_texts(self, texts_ND: torch.Tensor, settings: LabelSettings) -> torch.Tensor:
        """Relevance (N, M) of texts to all the images here; the transpose is r of METHODS §2."""
        rows_MC, mask_MC = self.captions_of(self.image_ids)
        return graded(self.vectors[rows_MC], texts_ND, settings, mask_MC=mask_MC).T

    def same_image(self, images: list[str]) -> torch.Tensor:
        """True (M, N) where the caption was written for the image."""
        rows = torch.tensor([self.image_row[i] for i in images])
        return rows[:, None] == torch.from_numpy(self.image_of)[None, :]

    def images_are(self, images: list[str]) -> torch.Tensor:
        """True (N, M) where image m here is the one named."""
        rows = torch.tensor([self.image_row[i] for i in images])
        return rows[:, None] == torch.arange(len(self.image_ids))[None, :]

    def held_out(self, images: list[str], settings: LabelSettings) -> torch.Tensor:
        """Relevance of each caption to its own image's other captions (needs two of them)."""
        values = []
        for image_id in images:
            row = self.image_row[image_id]
            own = self.vectors[self.first[row] : self.first[row] + self.count[row]]
            for k in range(len(own) if len(own) > 1 else 0):
                others = torch.cat([own[:k], own[k + 1 :]])
                values.append(graded(others[None], own[k : k + 1], settings).reshape(1))
        return torch.cat(values) if values else torch.zeros(0)


def graded(
    image_captions_MCD: torch.Tensor, texts_ND: torch.Tensor, settings: LabelSettings, **masks
) -> torch.Tensor:
    """Relevance (M, N) of images, given by their captions, to texts, as the settings say."""
    step = {"centre": settings.centre, "width": settings.width}
    return relevance.from_captions(
        image_captions_MCD,
        texts_ND,
        map=settings.map,
        reduce=settings.reduce,
        **(step if settings.map == "logistic" else {}),
        **masks,
    )


def _histogram(values: torch.Tensor) -> np.ndarray:
    return np.histogram(values.numpy(), bins=BINS, range=(0, 1))[0]


def _top(direction: str, ids: list[str], r_QN, same_QN, top_k: int) -> list[dict]:
    r_QN = r_QN.masked_fill(same_QN, -1)
    best = torch.topk(r_QN, min(top_k, r_QN.shape[1]), dim=1)
    rows = []
    for query_id, candidates, values in zip(
        ids, best.indices.numpy(), best.values.numpy(), strict=True
    ):
        known = values >= 0
        rows.append(
            {
                "query_id": query_id,
                "direction": direction,
                "candidate": candidates[known].astype(np.int32),
                "relevance": values[known].astype(np.float16),
            }
        )
    return rows
