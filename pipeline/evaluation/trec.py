"""TREC runs and qrels, read and written."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.formulas.metrics_from_ranks import NOWHERE
from pipeline.retrieval.ranks import Ranks
from pipeline.retrieval.scores import Gallery, Matches
from pipeline.storage import store


@dataclass(frozen=True)
class Runs:
    """TREC runs: {query: {candidate: score}} of i2t and t2i; who is on no list is not found."""

    lists: dict[str, dict[str, dict[str, float]]]

    @property
    def image_ids(self) -> list[str]:
        return list(self.lists["i2t"])

    @property
    def text_ids(self) -> list[str]:
        return list(self.lists["t2i"])

    def rows(self, way: str) -> tuple[dict[str, int], dict[str, int]]:
        candidates = dict.fromkeys(c for of in self.lists[way].values() for c in of)
        sides = (self.lists[way], candidates)
        return tuple({id_: n for n, id_ in enumerate(ids)} for ids in sides)

    def places(self, i2t, t2i) -> tuple[Ranks, Ranks]:
        return self._places("i2t", i2t), self._places("t2i", t2i)

    def _places(self, way: str, pairs) -> Ranks:
        queries, candidates = (list(side) for side in self.rows(way))
        above_P, tied_P = np.full(pairs.shape[1], NOWHERE), np.ones(pairs.shape[1], np.int64)
        for p, (query, candidate) in enumerate(pairs.T):
            scored = self.lists[way][queries[query]]
            if (score := scored.get(candidates[candidate])) is not None:
                scores = np.fromiter(scored.values(), float)
                above_P[p], tied_P[p] = (scores > score).sum(), (scores == score).sum()
        return Ranks(above_P, tied_P)

    def images_of(self, way: str, ids) -> np.ndarray:
        """The queries themselves: a run does not say whose caption one is."""
        return np.array(ids)

    def scores(self, image_P: list[int], text_P: list[int]) -> torch.Tensor:
        raise InputError("a TREC run does not score every judged pair; give vectors or a matrix")

    def own(self) -> Matches:
        raise InputError("a TREC run does not say which pairs match; give --positives")

    def with_captions(self, count: int | None) -> tuple["Runs", int]:
        return self, 0

    def folds(self, count: int) -> list["Runs"]:
        if count > 1:
            raise InputError("a TREC run cannot be cut into folds; give vectors or a matrix")
        return [self]


def of_trec(i2t: str | None, t2i: str | None) -> Runs:
    """TREC runs, a line a pair: query Q0 candidate rank score tag. Scores order, not ranks."""
    lists: dict[str, Any] = {"i2t": {}, "t2i": {}}
    for way, uri in (("i2t", i2t), ("t2i", t2i)):
        for number, words in _lines(uri):
            try:
                query, _, candidate, _, score, _ = words
                lists[way].setdefault(query, {})[candidate] = float(score)
            except ValueError as error:
                raise InputError(
                    f"{uri} line {number} is {' '.join(words)!r}; write query Q0 candidate rank "
                    "score tag"
                ) from error
    return Runs(lists)


def write_trec(folder: str, gallery: Gallery, depth: int = 100, tag: str = "halftone") -> list[str]:
    """Writes runs, `depth` candidates a query, and qrels of both directions; their URIs."""
    if not isinstance(gallery, Gallery):
        raise InputError("TREC runs are written from vectors or a matrix; this is one already")
    written = []
    for way, of_query in gallery.own().items():
        queries, candidates = (list(side) for side in gallery.rows(way))
        lines = []
        for query, scores, rows in zip(
            queries, *(p.tolist() for p in gallery.top(way, depth)), strict=True
        ):
            for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
                lines.append(f"{query} Q0 {candidates[row]} {rank} {score:.9g} {tag}\n")
        qrels = [f"{query} 0 {match} 1\n" for query, of in of_query.items() for match in of]
        for name, content in ((f"{way}.run", lines), (f"{way}.qrels", qrels)):
            written.append(store.join(folder, name))
            store.write_bytes(written[-1], "".join(content).encode())
    return written


def _lines(uri: str | None):
    text = store.read_text(store.absolute(uri)) if uri else ""
    return ((n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip())
