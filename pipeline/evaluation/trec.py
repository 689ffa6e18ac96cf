"""TREC runs and qrels, read and written."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.formulas.metrics_from_ranks import NOWHERE
from pipeline.retrieval.ranks import Pairs, Ranks
from pipeline.retrieval.scores import DIRECTIONS, Items, Matches, Rows, System
from pipeline.storage import store, text_files

Lists = dict[str, dict[str, dict[str, float]]]  # {direction: {query: {candidate: score}}}
LINE = "query Q0 candidate rank score tag"
SEPARATORS = ("\t", r"[ \t]+", ",", ";")  # tabs first: then blanks are an id's own
UNWRITABLE = re.compile("[\t\r\n\0\ud800-\udfff]")


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

    def asked(self, given: Matches) -> "RunScores":
        """With an empty list for every query of `given`, of directions that have a run."""
        lists: Lists = {}
        for direction, of_query in self.items.lists.items():
            new = given.get(direction, {}).keys() - of_query.keys() if of_query else ()
            lists[direction] = of_query | {query: {} for query in sorted(new)}
        return RunScores.of(lists)

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
    """TREC runs, a line a pair: query Q0 candidate rank score tag. Scores order, not ranks.

    Fields are separated by blanks, or all by tabs, commas or semicolons: then ids may hold blanks.
    A score of -inf says that the candidate is not on the list.
    """
    lists: dict[str, Any] = {"i2t": {}, "t2i": {}}
    for direction, uri in (("i2t", i2t), ("t2i", t2i)):
        for line, query, candidate, score in _lines(uri) if uri else ():
            of_query = lists[direction].setdefault(query, {})
            if candidate in of_query:
                said = f"lists {candidate!r} for {query!r} again"
                raise InputError(f"{uri} line {line} {said}; leave each candidate once a query")
            of_query[candidate] = score
        for query, of_query in lists[direction].items():
            lists[direction][query] = {c: s for c, s in of_query.items() if s > -math.inf}
        if uri and not lists[direction]:
            raise InputError(f"{uri} holds no line; write {LINE}")
    return RunScores.of(lists)


def write(folder: str, system: System, depth: int = 100, tag: str = "halftone") -> list[str]:
    """Writes runs, `depth` candidates a query, and qrels of both directions; their URIs.

    Fields are separated by tabs where an id holds a blank, else by one blank.
    """
    if isinstance(system, RunScores):
        raise InputError("TREC runs are written from vectors or a matrix; this is one already")
    written, matches, gap = [], system.items.matches(), _gap(system.items)
    for direction in DIRECTIONS:
        queries, candidates = system.items.ids(direction)
        best = system.top(direction, np.arange(len(queries)), depth)
        lines: list[tuple] = []
        for query, scores, rows in zip(queries, *(part.tolist() for part in best), strict=True):
            listed = [(s, row) for s, row in zip(scores, rows, strict=True) if s > -math.inf]
            for rank, (score, row) in enumerate(listed, 1):
                lines.append((query, "Q0", candidates[row], rank, f"{score:.9g}", tag))
        of_query = matches[direction].items()
        qrels = [(query, 0, match, 1) for query, of in of_query for match in of]
        for name, content in ((f"{direction}.run", lines), (f"{direction}.qrels", qrels)):
            written.append(store.join(folder, name))
            text = "".join(gap.join(map(str, fields)) + "\n" for fields in content)
            store.write_bytes(written[-1], text.encode())
    return written


def _gap(items: Items) -> str:
    every = [*items.image_ids, *items.text_ids]
    if bad := [i for i in every if not i or i != i.strip() or UNWRITABLE.search(i)]:
        raise InputError(
            f"a TREC run cannot hold the id {bad[0]!r}; write ids without tabs, line ends, half "
            "characters and blanks at their ends"
        )
    return "\t" if any(re.search(r"\s", id_) for id_ in every) else " "


def _lines(uri: str) -> Iterator[tuple[int, str, str, float]]:
    """(line, query, candidate, score) of every line, all of one run."""
    separator = tag = None
    for number, line in text_files.lines(uri, f"a TREC run: {LINE}"):
        found = f"{uri} line {number} is {line.strip()!r}"
        tried = [separator] if separator else SEPARATORS
        separator = next((s for s in tried if _fields(line, s)), None)
        if separator is None:
            raise InputError(
                f"{found}; write {LINE} (a tag has no blanks, ids have none but between tabs)"
            )
        query, candidate, score, *of = _fields(line, separator)
        if not _number(score) < math.inf:
            raise InputError(f"{found}: the score {score!r} orders nothing; give a number")
        if tag not in (None, of):
            raise InputError(f"{found}, of another run than the line before; give one run's lines")
        tag = of
        yield number, query, candidate, _number(score)


def _fields(line: str, separator: str) -> list[str]:
    """Query, candidate, score and what tag there is; empty for a line of anything else."""
    words = [word.strip() for word in re.split(separator, line.strip())]
    if len(words) not in (5, 6) or words[1].upper() not in ("Q0", "0") or not words[3].isdigit():
        return []
    return [words[0], words[2], *words[4:]] if words[0] and words[2] else []


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
