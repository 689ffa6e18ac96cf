"""Rankings from any scores, with every query's own metrics.

Legend of the shape suffixes: Q queries, N candidates, K first candidates.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation import tower_vectors
from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.evaluation.intervals import DEPTHS, Queries
from pipeline.formulas import metrics
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval.scores import BLOCK, DIRECTIONS, Scores
from pipeline.storage import parquet
from pipeline.storage.plan import Piece
from schemas.ranking import RANKING


class Ranked(NamedTuple):
    """The first candidates of Q queries and where their positives stand, exactly."""

    score_QK: torch.Tensor  # falling
    row_QK: torch.Tensor
    values: dict[str, torch.Tensor]  # R_at_k and rank (Q,)

    @classmethod
    def of(cls, scores: Scores, direction: str, rows_Q, depth: int) -> "Ranked":
        pairs = scores.items.positives(direction, rows_Q)
        stand = scores.ranks(direction, rows_Q, pairs)
        query_P, above_P, tied_P = map(torch.from_numpy, (pairs.query_P, *stand))
        found = per_query(query_P, above_P, tied_P, len(rows_Q), ks=DEPTHS)
        values = {name: found[name] for name in ("rank", *(f"R_at_{k}" for k in DEPTHS))}
        return cls(*scores.top(direction, rows_Q, depth), values)

    def part(self, rows: slice) -> "Ranked":
        values = {name: value_Q[rows] for name, value_Q in self.values.items()}
        return Ranked(self.score_QK[rows], self.row_QK[rows], values)

    def ndcg(self, relevance_QN, k: int, scores: Scores, direction: str, rows_Q) -> torch.Tensor:
        """NDCG@k (Q,) against the relevance of all candidates.

        The first candidates say it all, but where the last of them ties with place k.
        """
        scores_QN = torch.full_like(relevance_QN, -torch.inf)
        scores_QN.scatter_(1, self.row_QK.long(), self.score_QK)
        length = self.score_QK.shape[1]
        if length < scores_QN.shape[1]:
            open_Q = (self.score_QK[:, -1] == self.score_QK[:, min(k, length) - 1]).numpy()
            if open_Q.any():
                scores_QN[open_Q] = scores.block(direction, rows_Q[open_Q])
        return metrics.ndcg(scores_QN, relevance_QN, k=k)


def write(piece: Piece, scores: Scores) -> dict:
    """Write the rankings of one shard's images and captions; a summary with their number.

    `scores` are of all that is not excluded of the split.
    """
    inputs, rows = piece.inputs, []
    relevance = GradedRelevance(inputs["judge"])
    kept = tower_vectors.read(inputs["vectors"]).items.kept(inputs["excluded"])
    for direction, (first, end), mine in zip(DIRECTIONS, inputs["rows"], kept, strict=True):
        rows_Q = np.flatnonzero((mine >= first) & (mine < end))
        some = bool(inputs["excluded"].captions)
        kept_N = kept[direction == "i2t"] if some else slice(None)  # a slice copies nothing
        rows += _rows(direction, rows_Q, scores, relevance, kept_N, inputs["recipe"].evaluate)
    table = pa.Table.from_pylist(rows, schema=RANKING)
    summary, protocol = {"split": inputs["split"], "queries": len(rows)}, inputs["protocol"]
    return parquet.write_table(piece.output, table, piece.fingerprint, summary, protocol=protocol)


def _rows(direction: str, rows_Q, scores: Scores, relevance, kept_N, settings) -> Iterator[dict]:
    """A row a query of the direction; relevance is graded by blocks of queries."""
    items = scores.items
    query_ids, candidate_ids = (np.array(ids, object) for ids in items.ids(direction))
    image_ids = np.array(items.image_ids if direction == "i2t" else items.text_image_ids, object)
    depth = max(settings.top_k, settings.ndcg_at + 1)
    together = scores.together or max(1, len(rows_Q))
    for first in range(0, len(rows_Q), together):
        asked_Q = rows_Q[first : first + together]
        everybody = Ranked.of(scores, direction, asked_Q, depth)
        for start in range(0, len(asked_Q), BLOCK):
            part = slice(start, start + BLOCK)
            ranked, part_Q = everybody.part(part), asked_Q[part]
            ids = query_ids[part_Q].tolist()
            best_QK, row_QK = (x[:, : settings.top_k] for x in ranked[:2])
            columns = {
                "query_id": ids,
                "image_id": image_ids[part_Q].tolist(),
                "direction": [direction] * len(ids),
                "candidate_id": candidate_ids[row_QK.numpy()].tolist(),
                "score": best_QK.tolist(),
                **{name: value_Q.tolist() for name, value_Q in ranked.values.items()},
            }
            for name, r_QN in relevance(direction, ids).items():
                graded = r_QN[:, kept_N], settings.ndcg_at, scores, direction, part_Q
                columns[name] = ranked.ndcg(*graded).tolist()
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))


def queries(uris: list[str]) -> dict[str, Queries]:
    """Every query's own metrics, by direction."""
    names = [name for name in RANKING.names if name not in ("candidate_id", "score")]
    table = parquet.read_tables(uris, names)
    columns = {name: table[name].to_numpy() for name in names}
    ids = ("query_id", "image_id", "direction")
    query_ids, image_ids, directions = (columns.pop(name).astype(str) for name in ids)
    out = {}
    for direction in DIRECTIONS:
        asked = directions == direction
        values = {name: column[asked].astype(np.float64) for name, column in columns.items()}
        out[direction] = Queries(query_ids[asked], image_ids[asked], values)
    return out
