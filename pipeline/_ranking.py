"""Rankings from tower vectors, block by block, with every query's own metrics.

`evaluate` and `rerank` differ only in where the scores come from.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline import _neighbours, _store, embed, ingest
from pipeline._exclusions import Leaving
from pipeline._plan import Piece
from pipeline.formulas import metrics
from pipeline.intervals import DEPTHS, Queries
from pipeline.label import Captions
from pipeline.sources import source
from schemas.ranking import RANKING
from schemas.settings import Recipe

BLOCK = 256  # queries scored at a time: BLOCK × N floats are held
Scored = Callable[[str, list[str]], torch.Tensor]


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

    def staying(self, leaving: Leaving) -> tuple[list[int], list[int]]:
        """Rows of the images and of the texts that are not excluded."""
        images = [i for i, image_id in enumerate(self.image_ids) if image_id not in leaving.images]
        texts = [i for i, text_id in enumerate(self.text_ids) if text_id not in leaving.captions]
        return images, texts

    def without(self, leaving: Leaving) -> "Vectors":
        """The images and texts that are not excluded."""
        if not leaving.captions:
            return self
        images, texts = self.staying(leaving)
        return Vectors(
            [self.image_ids[i] for i in images],
            [self.text_ids[i] for i in texts],
            [self.text_image_ids[i] for i in texts],
            self.images[images],
            self.texts[texts],
        )

    def side(self, direction: str) -> tuple[list[str], list[str], torch.Tensor]:
        """Ids, image ids and vectors of a direction's queries."""
        if direction == "i2t":
            return self.image_ids, self.image_ids, self.images
        return self.text_ids, self.text_image_ids, self.texts


def other(direction: str) -> str:
    return {"i2t": "t2i", "t2i": "i2t"}[direction]


def scores(queries_QD, candidates_ND) -> torch.Tensor:
    """Cosines (Q, N), summed in float64, or rounding would undo ties."""
    return (queries_QD.double() @ candidates_ND.double().T).float()


def positives(queries: list[str], candidates: list[str]) -> torch.Tensor:
    """True (Q, N) where query and candidate belong to one image, given both sides' image ids."""
    number = {image_id: i for i, image_id in enumerate(dict.fromkeys(candidates))}
    q = torch.tensor([number.get(image_id, -1) for image_id in queries])
    return q[:, None] == torch.tensor([number[image_id] for image_id in candidates])[None, :]


def write_rankings(piece: Piece, scored: Scored | None = None) -> dict:
    """Write the rankings of one shard's images and captions; a summary with their number.

    `scored(direction, query_ids)` gives other scores (Q, N) than the cosines.
    """
    if summary := _store.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    everyone = Vectors.read(inputs["vectors"], inputs["version"])
    mine = Vectors.read((inputs["shard"],), piece.fingerprint).without(inputs["leaving"])
    graded = Graded(inputs)
    rows = []
    for direction in ("i2t", "t2i"):
        rows += _ranked(direction, mine, everyone, inputs, graded, scored)
    table = pa.Table.from_pylist(rows, schema=RANKING)
    summary = {"split": inputs["split"], "queries": len(rows)}
    return _store.write_table(
        piece.output, table, piece.fingerprint, summary, protocol=inputs["protocol"]
    )


def _ranked(direction: str, mine: Vectors, everyone: Vectors, inputs, graded, scored) -> Iterator:
    settings = inputs["recipe"].evaluate
    query_ids, query_images, queries = mine.side(direction)
    leaving = inputs["leaving"]
    candidate_ids, candidate_images, candidates = everyone.without(leaving).side(other(direction))
    stay_N = everyone.staying(leaving)[direction == "i2t"] if leaving.captions else slice(None)
    for start in range(0, len(query_ids), BLOCK):
        part = slice(start, start + BLOCK)
        if scored is None:
            scores_QN = scores(queries[part], candidates)
        else:
            scores_QN = scored(direction, query_ids[part])
        positive_QN = positives(query_images[part], candidate_images)
        best_QK, rows_QK = _neighbours.largest(scores_QN, settings.top_k)
        columns = {
            "query_id": query_ids[part],
            "image_id": query_images[part],
            "direction": [direction] * len(query_ids[part]),
            "candidate_id": [[candidate_ids[i] for i in row] for row in rows_QK.tolist()],
            "score": best_QK.tolist(),
            "rank": metrics.expected_rank(scores_QN, positive_QN).tolist(),
            **{f"R_at_{k}": metrics.recall_at(scores_QN, positive_QN, k).tolist() for k in DEPTHS},
        }
        for name, r_QN in graded(direction, query_ids[part]).items():
            columns[name] = metrics.ndcg(scores_QN, r_QN[:, stay_N], k=settings.ndcg_at).tolist()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


class Graded:
    """Relevance (Q, N) of queries to all candidates: by the sentence encoder, and true if known."""

    def __init__(self, inputs: dict):
        self.recipe: Recipe = inputs["recipe"]
        self.captions = Captions.read(inputs["embeddings"], inputs["embeddings_version"])
        self.facts = _facts(inputs["truth"], inputs["truth_version"]) if inputs["truth"] else None

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


def queries(uris: list[str]) -> dict[str, Queries]:
    """Every query's own metrics, by direction."""
    unread = ("candidate_id", "score")
    names = [name for name in RANKING.names if name not in unread]
    table = pa.concat_tables(
        [_store.read_table(uri, names).replace_schema_metadata() for uri in uris]
    )
    columns = {name: table[name].to_numpy() for name in names}
    query_ids, image_ids, directions = (
        columns.pop(name).astype(str) for name in ("query_id", "image_id", "direction")
    )
    return {
        direction: Queries(
            query_ids[mine],
            image_ids[mine],
            {name: column[mine].astype(np.float64) for name, column in columns.items()},
        )
        for direction in ("i2t", "t2i")
        for mine in [directions == direction]
    }
