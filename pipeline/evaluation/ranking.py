"""Rankings from any scores, with every query's own metrics.

Legend of the shape suffixes: Q queries, N candidates, K first candidates.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation import tower_vectors
from pipeline.evaluation.graded_ndcg import Graded
from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.evaluation.intervals import DEPTHS, Queries
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval.scores import DIRECTIONS, SIDES, Scores
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


def write(piece: Piece, scores: Scores) -> dict:
    """Write the rankings of one shard's images and captions; a summary with their number.

    `scores` are of all that is not excluded of the split.
    """
    inputs, tables = piece.inputs, []
    settings = inputs["recipe"].evaluate
    limit = inputs["recipe"].train.cache_gb * 1e9
    everyone = tower_vectors.read(inputs["vectors"], limit).items
    relevance = GradedRelevance(inputs["judge"], everyone, limit)
    relevance.check(piece.name, *(range(*ends) for ends in inputs["rows"]))
    kept = everyone.kept(inputs["excluded"])
    for direction, (first, end), mine in zip(DIRECTIONS, inputs["rows"], kept, strict=True):
        rows_Q = np.flatnonzero((mine >= first) & (mine < end))
        graded = Graded(relevance, direction, mine, kept[direction == "i2t"], settings.ndcg_at)
        tables += _tables(direction, rows_Q, scores, graded, settings)
    table = pa.concat_tables([RANKING.empty_table(), *tables]).combine_chunks()
    summary, protocol = {"split": inputs["split"], "queries": len(table)}, inputs["protocol"]
    return parquet.write_table(piece.output, table, piece.fingerprint, summary, protocol=protocol)


def _tables(direction: str, rows_Q, scores: Scores, graded: Graded, settings) -> Iterator[pa.Table]:
    """A row a query of the direction."""
    query_side, candidate_side = SIDES[direction]
    items, names = scores.items, [*(f"R_at_{k}" for k in DEPTHS)]
    depth = max(settings.top_k, settings.ndcg_at + 1)
    together = scores.together or max(1, len(rows_Q))
    for first in range(0, len(rows_Q), together):
        part_Q = rows_Q[first : first + together]
        ranked = Ranked.of(scores, direction, part_Q, depth)
        best_QK, row_QK = (x[:, : settings.top_k].contiguous() for x in ranked[:2])
        owners = part_Q if direction == "i2t" else items.image_of_N[part_Q]
        ids = items.ids_at(candidate_side, row_QK.numpy().reshape(-1))
        ends = pa.array(np.arange(len(part_Q) + 1, dtype=np.int32) * row_QK.shape[1])
        columns = {
            "query_id": pa.array(items.ids_at(query_side, part_Q), pa.string()),
            "image_id": pa.array(items.ids_at("image", owners), pa.string()),
            "direction": pa.array([direction] * len(part_Q), pa.string()),
            "candidate_id": pa.ListArray.from_arrays(ends, pa.array(ids, pa.string())),
            "score": pa.ListArray.from_arrays(ends, pa.array(best_QK.numpy().reshape(-1))),
            **{name: pa.array(ranked.values[name].numpy()) for name in ("rank", *names)},
        }
        found = {
            name: pa.array(v.numpy(), from_pandas=False)
            for name, v in graded.ndcg(ranked, scores, part_Q).items()
        }
        missing = pa.nulls(len(part_Q), pa.float64())
        columns |= {n: found.get(n, missing) for n in RANKING.names if n not in columns}
        yield pa.table(columns, schema=RANKING)


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
