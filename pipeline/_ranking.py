"""Rankings from tower vectors, block by block, with every query's own metrics.

`evaluate` and `rerank` differ only in the bias that is taken off each candidate's score.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline import _store, embed, ingest
from pipeline._plan import Piece
from pipeline.formulas import metrics
from pipeline.label import Captions
from pipeline.sources import source
from schemas.ranking import RANKING
from schemas.settings import Recipe

BLOCK = 256  # queries scored at a time: BLOCK × N floats are held
DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Vectors:
    """Tower vectors of one split: M images, N texts, in shard order."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]
    images: torch.Tensor  # (M, D)
    texts: torch.Tensor  # (N, D)

    @classmethod
    def of(cls, table: pa.Table) -> "Vectors":
        vectors = embed.vector_matrix(table["vector"])
        is_image = np.array([m == "image" for m in table["modality"].to_pylist()], bool)
        ids = np.array(table["id"].to_pylist(), object)
        image_ids = np.array(table["image_id"].to_pylist(), object)
        return cls(
            ids[is_image].tolist(),
            ids[~is_image].tolist(),
            image_ids[~is_image].tolist(),
            torch.from_numpy(vectors[is_image]),
            torch.from_numpy(vectors[~is_image]),
        )

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def read(uris: tuple[str, ...], version: str) -> "Vectors":
        """Read once per process: `version` tells apart what the same files held at other times."""
        tables = [_store.read_table(uri).replace_schema_metadata() for uri in uris]
        return Vectors.of(pa.concat_tables(tables))

    def head(self, images: int) -> "Vectors":
        """The first images and their texts."""
        kept = set(self.image_ids[:images])
        texts = [i for i, image_id in enumerate(self.text_image_ids) if image_id in kept]
        return Vectors(
            self.image_ids[:images],
            [self.text_ids[i] for i in texts],
            [self.text_image_ids[i] for i in texts],
            self.images[:images],
            self.texts[texts],
        )

    def side(self, direction: str) -> tuple[list[str], list[str], torch.Tensor]:
        """Ids, image ids and vectors of a direction's queries."""
        if direction == "i2t":
            return self.image_ids, self.image_ids, self.images
        return self.text_ids, self.text_image_ids, self.texts


def other(direction: str) -> str:
    return {"i2t": "t2i", "t2i": "i2t"}[direction]


def scores(queries_QD, candidates_ND, bias_N=0.0) -> torch.Tensor:
    """Cosines less each candidate's bias (Q, N); summed in float64, or rounding would undo ties."""
    return (queries_QD.double() @ candidates_ND.double().T).float() - bias_N


def positives(queries: list[str], candidates: list[str]) -> torch.Tensor:
    """True (Q, N) where query and candidate belong to one image, given both sides' image ids."""
    number = {image_id: i for i, image_id in enumerate(dict.fromkeys(candidates))}
    q = torch.tensor([number.get(image_id, -1) for image_id in queries])
    return q[:, None] == torch.tensor([number[image_id] for image_id in candidates])[None, :]


def write_rankings(piece: Piece) -> dict:
    """Write the rankings of one shard's images and captions; a summary with their number."""
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    everyone = Vectors.read(inputs["vectors"], inputs["version"])
    mine = Vectors.read((inputs["shard"],), piece.fingerprint)
    graded = Graded(inputs)
    rows = []
    for direction in ("i2t", "t2i"):
        rows += _ranked(direction, mine, everyone, inputs, graded)
    table = pa.Table.from_pylist(rows, schema=RANKING)
    summary = {"split": inputs["split"], "queries": len(rows)}
    return _store.write_table(
        piece.output, table, piece.fingerprint, summary, protocol=inputs["protocol"]
    )


def _ranked(direction: str, mine: Vectors, everyone: Vectors, inputs: dict, graded) -> Iterator:
    settings = inputs["recipe"].evaluate
    query_ids, query_images, queries = mine.side(direction)
    candidate_ids, candidate_images, candidates = everyone.side(other(direction))
    bias_N = biases(inputs["bias"], inputs["version"], direction) if inputs.get("bias") else 0.0
    for start in range(0, len(query_ids), BLOCK):
        part = slice(start, start + BLOCK)
        scores_QN = scores(queries[part], candidates, bias_N)
        positive_QN = positives(query_images[part], candidate_images)
        best = torch.topk(scores_QN, min(settings.top_k, scores_QN.shape[1]), dim=1)
        columns = {
            "query_id": query_ids[part],
            "direction": [direction] * len(query_ids[part]),
            "candidate_id": [[candidate_ids[i] for i in row] for row in best.indices.tolist()],
            "score": best.values.tolist(),
            "rank": metrics.expected_rank(scores_QN, positive_QN).tolist(),
            **{f"R_at_{k}": metrics.recall_at(scores_QN, positive_QN, k).tolist() for k in DEPTHS},
        }
        for name, r_QN in graded(direction, query_ids[part]).items():
            columns[name] = metrics.ndcg(scores_QN, r_QN, k=settings.ndcg_at).tolist()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


@functools.lru_cache(maxsize=2)
def _bias_table(uri: str, version: str) -> dict[str, torch.Tensor]:
    table = _store.read_table(uri)
    values = np.array(table["bias"].to_pylist(), np.float32)
    directions = np.array(table["direction"].to_pylist())
    return {d: torch.from_numpy(values[directions == d]) for d in ("i2t", "t2i")}


def biases(uri: str, version: str, direction: str) -> torch.Tensor:
    """What is taken off each candidate's score (N,), in shard order."""
    return _bias_table(uri, version)[direction]


class Graded:
    """Relevance (Q, N) of queries to all candidates: by the sentence encoder, and true if known."""

    def __init__(self, inputs: dict):
        self.recipe: Recipe = inputs["recipe"]
        self.captions = Captions.read(inputs["embeddings"], inputs["embeddings_version"])
        self.facts = _facts(inputs["truth"], inputs["truth_version"]) if inputs["truth"] else None

    def __call__(self, direction: str, query_ids: list[str]) -> dict[str, torch.Tensor]:
        captions = self.captions
        if direction == "i2t":
            images, texts = query_ids, captions.caption_ids
            vectors, mask = captions.vectors_MCD(images), captions.mask(images)
            label = captions.relevance(vectors, self.recipe.label, mask_MC=mask)
            own = captions.same_image(images)
        else:
            row = {caption_id: i for i, caption_id in enumerate(captions.caption_ids)}
            rows = [row[q] for q in query_ids]
            images, texts = captions.image_ids, query_ids
            label = captions.relevance_of_texts(captions.vectors[rows], self.recipe.label)
            own = captions.images_are([captions.caption_image[r] for r in rows])
        graded = {"ndcg_label": label.masked_fill(own, 1.0)}
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


def averages(uris: list[str]) -> dict[str, float]:
    """Means over all queries: recalls in percent, their sum, median ranks, NDCG in [0, 1]."""
    columns = [name for name in RANKING.names if name not in ("candidate_id", "score", "query_id")]
    table = pa.concat_tables(
        [_store.read_table(uri, columns).replace_schema_metadata() for uri in uris]
    )
    directions = np.array(table["direction"].to_pylist())
    out: dict[str, float] = {}
    for direction in ("i2t", "t2i"):
        mine = {name: table[name].to_numpy()[directions == direction] for name in columns[1:]}
        for k in DEPTHS:
            out[f"{direction}_R_at_{k}"] = 100 * float(mine[f"R_at_{k}"].mean())
        out[f"{direction}_MedR"] = float(np.median(mine["rank"]))
        for name in ("ndcg_label", "ndcg_truth"):
            values = mine[name].astype(np.float64)
            if np.isfinite(values).any():
                out[f"{direction}_{name}"] = float(np.nanmean(values))
    out["rsum"] = sum(value for name, value in out.items() if "_R_at_" in name)
    return out
