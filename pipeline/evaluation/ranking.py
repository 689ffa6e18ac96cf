"""Rankings from tower vectors or other scores, with every query's own metrics.

`evaluate` and `rerank` differ only in where the scores come from. Of vectors no product is kept:
places are counted and the first candidates found, both exactly; relevance is graded by blocks.

Legend of the shape suffixes: M images, N texts or candidates, D width, Q queries, K first
candidates, R of the queries.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.evaluation.intervals import DEPTHS, Queries
from pipeline.formulas import metrics
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval import nearest, ranks
from pipeline.retrieval.ranks import Pairs
from pipeline.retrieval.scores import Vectors, other, own, scores
from pipeline.storage import parquet
from pipeline.storage.plan import Piece
from schemas.ranking import RANKING

BLOCK = 256  # queries graded at a time: BLOCK × N floats are held
NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
Scored = Callable[[str, list[str]], torch.Tensor]


class Ranked(NamedTuple):
    """The first candidates of Q queries and where their positives stand, exactly."""

    score_QK: torch.Tensor  # falling
    row_QK: torch.Tensor
    values: dict[str, torch.Tensor]  # R_at_k and rank (Q,)

    @classmethod
    def of_vectors(cls, queries, candidates, pairs: Pairs, depth: int) -> "Ranked":
        places, _ = ranks.of_vectors(queries, candidates, pairs, NONE)
        best = nearest.top_k(queries, candidates, depth)
        return cls(*best, _values(pairs, places, len(queries)))

    @classmethod
    def of_scores(cls, scores_QN, pairs: Pairs, depth: int) -> "Ranked":
        places, _ = ranks.of_matrix(scores_QN, pairs, NONE)
        best = nearest.largest(scores_QN, depth)
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


def _values(pairs: Pairs, places: ranks.Ranks, queries: int) -> dict[str, torch.Tensor]:
    parts = (torch.from_numpy(part) for part in (pairs.query_P, *places))
    found = per_query(*parts, queries, ks=DEPTHS)
    return {name: found[name] for name in ("rank", *(f"R_at_{k}" for k in DEPTHS))}


def write_rankings(piece: Piece, scored: Scored | None = None) -> dict:
    """Write the rankings of one shard's images and captions; a summary with their number.

    `scored(direction, query_ids)` gives other scores (Q, N) than the cosines.
    """
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    inputs = piece.inputs
    everyone = Vectors.read(inputs["vectors"], inputs["version"])
    mine = Vectors.read((inputs["shard"],), piece.fingerprint).without(inputs["leaving"])
    graded = GradedRelevance(inputs)
    rows = []
    for direction in ("i2t", "t2i"):
        rows += _rows(direction, mine, everyone, inputs, graded, scored)
    table = pa.Table.from_pylist(rows, schema=RANKING)
    summary = {"split": inputs["split"], "queries": len(rows)}
    return parquet.write_table(
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
        [parquet.read_table(uri, names).replace_schema_metadata() for uri in uris]
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
