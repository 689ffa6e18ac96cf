"""Rankings from any scores, with every query's own metrics.

Relevance is made of some candidates at a time: of each query what those have that it ranked first,
and the most that others have, is all that NDCG to a depth asks for: a gallery may be of any size.

Legend of the shape suffixes: Q queries, N candidates, K first candidates, B candidates of a span.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.evaluation import tower_vectors
from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.evaluation.intervals import DEPTHS, Queries
from pipeline.formulas import metrics
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval.scores import BLOCK, DIRECTIONS, SIDES, Scores
from pipeline.storage import parquet
from pipeline.storage.plan import Piece
from schemas.ranking import RANKING

CELLS = 2**22  # of queries with all candidates at a time, where a tie asks for all


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


@dataclass(frozen=True)
class Graded:
    """How the queries of a direction are graded: rows count on through all that is not excluded."""

    relevance: GradedRelevance
    direction: str
    queries: np.ndarray  # of those that are not excluded, the row among all
    candidates: np.ndarray
    depth: int  # of NDCG

    def ndcg(self, ranked: Ranked, scores: Scores, rows_Q: np.ndarray) -> dict[str, torch.Tensor]:
        """NDCG (Q,) of ranked queries, by whose relevance. `ranked` has their score_QK, row_QK."""
        spans, parts = self.relevance.spans(self.direction), _slices(len(rows_Q), BLOCK)
        score_QK, row_QK = ranked.score_QK, ranked.row_QK.long()
        if len(spans) == 1:  # nothing has to be put together
            return _joined(
                self._of_all(score_QK[part], row_QK[part], scores, rows_Q[part]) for part in parts
            )
        held = [_Held(score_QK[part], row_QK[part], self.depth) for part in parts]
        for span in spans:
            for of_part, part in zip(held, parts, strict=True):
                of_part.take(self._relevance(rows_Q[part], span), self._places(span))
        found = _joined(of_part.ndcg() for of_part in held)
        # Where the last of the first candidates ties with place k, others may share the place.
        open_Q = np.flatnonzero(
            score_QK[:, -1] == score_QK[:, min(self.depth, len(score_QK[0])) - 1]
        )
        for few in np.array_split(open_Q, -(-len(open_Q) * len(self.candidates) // CELLS) or 1):
            again = self._of_all(score_QK[few], row_QK[few], scores, rows_Q[few])
            for name, value_Q in again.items():
                found[name][few] = value_Q
        return found

    def _places(self, span: slice) -> tuple[int, int]:
        """Where the span's candidates begin and end among those that are not excluded."""
        first, end = np.searchsorted(self.candidates, (span.start, span.stop))
        return int(first), int(end)

    def _relevance(self, rows_Q: np.ndarray, span: slice) -> dict[str, torch.Tensor]:
        """Relevance (Q, B) to those of a span that are not excluded."""
        found = self.relevance(self.direction, self.queries[rows_Q], span)
        first, end = self._places(span)
        if end - first == span.stop - span.start:
            return found
        columns = torch.from_numpy(self.candidates[first:end] - span.start)
        return {name: r_QB[:, columns] for name, r_QB in found.items()}

    def _of_all(self, score_QK, row_QK, scores: Scores, rows_Q) -> dict[str, torch.Tensor]:
        """NDCG (Q,) against the relevance of all candidates at once.

        The first candidates say it all, but where the last of them ties with place k.
        """
        spans = self.relevance.spans(self.direction)
        parts = [self._relevance(rows_Q, span) for span in spans]
        out = {}
        for name in parts[0] if parts else ():
            found = [part[name] for part in parts]
            relevance_QN = found[0] if len(found) == 1 else torch.cat(found, dim=1)
            scores_QN = torch.full_like(relevance_QN, -torch.inf)
            scores_QN.scatter_(1, row_QK, score_QK)
            length = score_QK.shape[1]
            if length < scores_QN.shape[1]:
                last = min(self.depth, length) - 1
                open_Q = (score_QK[:, -1] == score_QK[:, last]).numpy()
                if open_Q.any():
                    scores_QN[open_Q] = scores.block(self.direction, rows_Q[open_Q])
            out[name] = metrics.ndcg(scores_QN, relevance_QN, k=self.depth)
        return out


@dataclass
class _Held:
    """Of some queries the relevance of their first candidates, and the most that others have."""

    score_QK: torch.Tensor
    row_QK: torch.Tensor
    depth: int
    of_first: dict[str, torch.Tensor] = field(default_factory=dict)  # (Q, K)
    of_others: dict[str, torch.Tensor] = field(default_factory=dict)  # (Q, depth), in any order

    def take(self, graded: dict[str, torch.Tensor], places: tuple[int, int]) -> None:
        """Look at the relevance (Q, B) of the candidates between two places."""
        first, end = places
        q, k = torch.nonzero((self.row_QK >= first) & (self.row_QK < end), as_tuple=True)
        column = self.row_QK[q, k] - first
        for name, r_QB in graded.items():
            here = self.of_first.setdefault(name, torch.zeros_like(self.score_QK))
            here[q, k] = r_QB[q, column]
            r_QB[q, column] = -torch.inf
            best = torch.topk(r_QB, min(self.depth, r_QB.shape[1]), dim=1, sorted=False).values
            both = torch.cat([self.of_others.get(name, best[:, :0]), best], dim=1)
            most = min(self.depth, both.shape[1])
            self.of_others[name] = torch.topk(both, most, dim=1, sorted=False).values

    def ndcg(self) -> dict[str, torch.Tensor]:
        """NDCG (Q,): others have places in the ideal order alone, those that are none no gain."""
        out = {}
        for name, of_first in self.of_first.items():
            relevance = torch.cat([of_first, self.of_others[name].clamp(min=0)], dim=1)
            scores = torch.full_like(relevance, -torch.inf)
            scores[:, : self.score_QK.shape[1]] = self.score_QK
            out[name] = metrics.ndcg(scores, relevance, k=self.depth)
        return out


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _joined(parts) -> dict[str, torch.Tensor]:
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


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
