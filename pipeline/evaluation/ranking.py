"""Rankings from tower vectors or other scores, with every query's own metrics.

`evaluate` and `rerank` differ only in where the scores come from. Of vectors no product is kept:
places are counted and the first candidates found, both exactly; relevance is graded by blocks.

Legend of the shape suffixes: M images, N texts or candidates, D width, Q queries, K first
candidates, R of the queries.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation.graded_relevance import Graded
from pipeline.evaluation.intervals import DEPTHS, Queries
from pipeline.formulas import metrics
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval import nearest as _neighbours
from pipeline.retrieval import ranks as _counting
from pipeline.retrieval.ranks import Pairs
from pipeline.sharding.exclusions import Leaving
from pipeline.storage import store as _store
from pipeline.storage.plan import Piece
from pipeline.storage.vector_columns import vector_matrix
from schemas.ranking import RANKING

BLOCK = 256  # queries graded at a time: BLOCK × N floats are held
NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
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
        vectors = vector_matrix(table["vector"])
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


def own(queries: list[str], candidates: list[str]) -> Pairs:
    """Rows of queries and of candidates of the same image, given both sides' image ids."""
    number = {image_id: n for n, image_id in enumerate(dict.fromkeys(candidates))}
    of_query = np.array([number.get(image_id, -1) for image_id in queries], np.int64)
    of_candidate = np.array([number[image_id] for image_id in candidates], np.int64)
    order = np.argsort(of_candidate, kind="stable")
    start = np.searchsorted(of_candidate[order], of_query)
    count = np.searchsorted(of_candidate[order], of_query, side="right") - start
    step = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    return Pairs(np.repeat(np.arange(len(queries)), count), order[np.repeat(start, count) + step])


class Ranked(NamedTuple):
    """The first candidates of Q queries and where their positives stand, exactly."""

    score_QK: torch.Tensor  # falling
    row_QK: torch.Tensor
    values: dict[str, torch.Tensor]  # R_at_k and rank (Q,)

    @classmethod
    def of_vectors(cls, queries, candidates, pairs: Pairs, depth: int) -> "Ranked":
        places, _ = _counting.of_vectors(queries, candidates, pairs, NONE)
        best = _neighbours.top_k(queries, candidates, depth)
        return cls(*best, _values(pairs, places, len(queries)))

    @classmethod
    def of_scores(cls, scores_QN, pairs: Pairs, depth: int) -> "Ranked":
        places, _ = _counting.of_matrix(scores_QN, pairs, NONE)
        best = _neighbours.largest(scores_QN, depth)
        return cls(*best, _values(pairs, places, len(scores_QN)))

    def part(self, rows: slice) -> "Ranked":
        values = {name: value_Q[rows] for name, value_Q in self.values.items()}
        return Ranked(self.score_QK[rows], self.row_QK[rows], values)

    def ndcg(self, relevance_QN, k: int, whole: Callable[[torch.Tensor], torch.Tensor]):
        """NDCG@k (Q,) against the relevance of all candidates.

        The first candidates say it all, but where the last of them ties with place k:
        `whole(rows)` gives all the scores (R, N) of those queries.
        """
        scores_QN = torch.full_like(relevance_QN, -torch.inf)
        scores_QN.scatter_(1, self.row_QK.long(), self.score_QK)
        length = self.score_QK.shape[1]
        if length < scores_QN.shape[1]:
            open_Q = self.score_QK[:, -1] == self.score_QK[:, min(k, length) - 1]
            if open_Q.any():
                scores_QN[open_Q] = whole(torch.nonzero(open_Q)[:, 0])
        return metrics.ndcg(scores_QN, relevance_QN, k=k)


def _values(pairs: Pairs, places: _counting.Places, queries: int) -> dict[str, torch.Tensor]:
    parts = (torch.from_numpy(part) for part in (pairs.query_P, *places))
    found = per_query(*parts, queries, ks=DEPTHS)
    return {name: found[name] for name in ("rank", *(f"R_at_{k}" for k in DEPTHS))}


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
        rows += _rows(direction, mine, everyone, inputs, graded, scored)
    table = pa.Table.from_pylist(rows, schema=RANKING)
    summary = {"split": inputs["split"], "queries": len(rows)}
    return _store.write_table(
        piece.output, table, piece.fingerprint, summary, protocol=inputs["protocol"]
    )


def _rows(direction: str, mine: Vectors, everyone: Vectors, inputs, graded, scored) -> Iterator:
    """A row a query of the direction."""
    settings, leaving = inputs["recipe"].evaluate, inputs["leaving"]
    query_ids, query_images, queries = mine.side(direction)
    candidate_ids, candidate_images, candidates = everyone.without(leaving).side(other(direction))
    stay_N = everyone.staying(leaving)[direction == "i2t"] if leaving.captions else slice(None)
    depth = max(settings.top_k, settings.ndcg_at + 1)
    if scored is None:
        pairs = own(query_images, candidate_images)
        everybody = Ranked.of_vectors(queries, candidates, pairs, depth)
    for start in range(0, len(query_ids), BLOCK):
        part = slice(start, start + BLOCK)
        if scored is None:
            ranked, of_part = everybody.part(part), queries[part]
            whole = functools.partial(_whole, of_part, candidates)
        else:
            scores_QN = scored(direction, query_ids[part])
            pairs = own(query_images[part], candidate_images)
            ranked, whole = Ranked.of_scores(scores_QN, pairs, depth), scores_QN.__getitem__
        best_QK, rows_QK = (x[:, : settings.top_k].tolist() for x in ranked[:2])
        columns = {
            "query_id": query_ids[part],
            "image_id": query_images[part],
            "direction": [direction] * len(query_ids[part]),
            "candidate_id": [[candidate_ids[i] for i in row] for row in rows_QK],
            "score": best_QK,
            **{name: value_Q.tolist() for name, value_Q in ranked.values.items()},
        }
        for name, r_QN in graded(direction, query_ids[part]).items():
            columns[name] = ranked.ndcg(r_QN[:, stay_N], settings.ndcg_at, whole).tolist()
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def _whole(queries, candidates, rows) -> torch.Tensor:
    return scores(queries[rows], candidates)


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
