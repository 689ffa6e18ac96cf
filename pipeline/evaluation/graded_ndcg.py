"""NDCG of rankings against graded relevance, of a gallery of any size.

Relevance is made of some candidates at a time: of each query what those have that it ranked first,
and the most that others have, is all that NDCG to a depth asks for.

Legend of the shape suffixes: Q queries, K first candidates, N candidates, B candidates of a span.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.formulas import metrics
from pipeline.retrieval.scores import BLOCK, Scores

CELLS = 2**22  # of queries with all candidates at a time, where a tie asks for all


@dataclass(frozen=True)
class Graded:
    """How the queries of a direction are graded: rows count on through all that is not excluded."""

    relevance: GradedRelevance
    direction: str
    queries: np.ndarray  # of those that are not excluded, the row among all
    candidates: np.ndarray
    depth: int  # of NDCG

    def ndcg(self, ranked: Any, scores: Scores, rows_Q: np.ndarray) -> dict[str, Tensor]:
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

    def _relevance(self, rows_Q: np.ndarray, span: slice) -> dict[str, Tensor]:
        """Relevance (Q, B) to those of a span that are not excluded."""
        found = self.relevance(self.direction, self.queries[rows_Q], span)
        first, end = self._places(span)
        if end - first == span.stop - span.start:
            return found
        columns = torch.from_numpy(self.candidates[first:end] - span.start)
        return {name: r_QB[:, columns] for name, r_QB in found.items()}

    def _of_all(self, score_QK, row_QK, scores: Scores, rows_Q) -> dict[str, Tensor]:
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

    score_QK: Tensor
    row_QK: Tensor
    depth: int
    of_first: dict[str, Tensor] = field(default_factory=dict)  # (Q, K)
    of_others: dict[str, Tensor] = field(default_factory=dict)  # (Q, depth), in any order

    def take(self, graded: dict[str, Tensor], places: tuple[int, int]) -> None:
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

    def ndcg(self) -> dict[str, Tensor]:
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


def _joined(parts) -> dict[str, Tensor]:
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
