"""TREC runs and qrels, read and written."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.formulas.metrics_from_ranks import NOWHERE
from pipeline.retrieval.ranks import Pairs, Ranks
from pipeline.retrieval.scores import DIRECTIONS, Items, Matches, Rows, System
from pipeline.storage import store

Lists = dict[str, dict[str, dict[str, float]]]  # {direction: {query: {candidate: score}}}


@dataclass(frozen=True)
class RunItems(Items):
    """Who is on the lists of runs: queries have one, candidates are on one."""

    lists: Lists = field(default_factory=dict)

    def rows(self, direction: str) -> tuple[dict[str, int], dict[str, int]]:
        of_query = self.lists[direction]
        candidates = dict.fromkeys(c for of in of_query.values() for c in of)
        return {q: n for n, q in enumerate(of_query)}, {c: n for n, c in enumerate(candidates)}

    def images_of(self, direction: str, query_ids) -> np.ndarray:
        """The queries themselves: a run does not say whose caption one is."""
        return np.array(query_ids)

    def matches(self) -> Matches:
        raise InputError("a TREC run does not say which pairs match; give --positives")

    def first_captions(self, count: int | None) -> Rows:
        return np.arange(len(self.image_ids)), np.arange(len(self.text_ids))

    def folds(self, count: int) -> list[Rows]:
        raise InputError("a TREC run cannot be cut into folds; give vectors or a matrix")


@dataclass(frozen=True)
class RunScores:
    """TREC runs of both directions; who is on no list is not found."""

    items: RunItems

    @classmethod
    def of(cls, lists: Lists) -> "RunScores":
        return cls(RunItems(list(lists["i2t"]), list(lists["t2i"]), [], lists))

    def ranks_of_both(self, i2t: Pairs, t2i: Pairs) -> tuple[Ranks, Ranks]:
        return self._ranks("i2t", i2t), self._ranks("t2i", t2i)

    def _ranks(self, direction: str, pairs: Pairs) -> Ranks:
        queries, candidates = (list(side) for side in self.items.rows(direction))
        count = len(pairs.query_P)
        above_P, tied_P = np.full(count, NOWHERE), np.ones(count, np.int64)
        for p, (query, candidate) in enumerate(zip(*pairs, strict=True)):
            scored = self.items.lists[direction][queries[query]]
            if (score := scored.get(candidates[candidate])) is not None:
                scores = np.fromiter(scored.values(), float)
                above_P[p], tied_P[p] = (scores > score).sum(), (scores == score).sum()
        return Ranks(above_P, tied_P)

    def of_pairs(self, image_P, text_P) -> torch.Tensor:
        raise InputError("a TREC run does not score every judged pair; give vectors or a matrix")


def read(i2t: str | None, t2i: str | None) -> RunScores:
    """TREC runs, a line a pair: query Q0 candidate rank score tag. Scores order, not ranks."""
    lists: dict[str, Any] = {"i2t": {}, "t2i": {}}
    for direction, uri in (("i2t", i2t), ("t2i", t2i)):
        for number, words in _lines(uri):
            try:
                query, _, candidate, _, score, _ = words
                lists[direction].setdefault(query, {})[candidate] = float(score)
            except ValueError as error:
                found = f"{uri} line {number} is {' '.join(words)!r}"
                raise InputError(f"{found}; write query Q0 candidate rank score tag") from error
    return RunScores.of(lists)


def write(folder: str, system: System, depth: int = 100, tag: str = "halftone") -> list[str]:
    """Writes runs, `depth` candidates a query, and qrels of both directions; their URIs."""
    if isinstance(system, RunScores):
        raise InputError("TREC runs are written from vectors or a matrix; this is one already")
    written, matches = [], system.items.matches()
    for direction in DIRECTIONS:
        queries, candidates = system.items.ids(direction)
        best = system.top(direction, np.arange(len(queries)), depth)
        lines = []
        for query, scores, rows in zip(queries, *(part.tolist() for part in best), strict=True):
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
                lines.append(f"{query} Q0 {candidates[row]} {rank} {score:.9g} {tag}\n")
        of_query = matches[direction].items()
        qrels = [f"{query} 0 {match} 1\n" for query, of in of_query for match in of]
        for name, content in ((f"{direction}.run", lines), (f"{direction}.qrels", qrels)):
            written.append(store.join(folder, name))
            store.write_bytes(written[-1], "".join(content).encode())
    return written


def _lines(uri: str | None):
    text = store.read_text(store.absolute(uri)) if uri else ""
    return ((n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip())
