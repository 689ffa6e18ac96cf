"""Pairs that match, in files of other programs: CSV, JSON or TREC's qrels."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError

from pipeline.errors import InputError
from pipeline.evaluation.trec import RunItems
from pipeline.retrieval.scores import DIRECTIONS, Items, Matches, other
from pipeline.storage import csv_files, ids, store, text_files

LOG = logging.getLogger(__name__)
WHAT = "the pairs that match: CSV (image_id,caption_id), JSON ({i2t: {image: [caption]}}) or qrels"
QRELS = (  # query, iteration, candidate, relevance; with tabs blanks are an id's own
    re.compile(r"([^\t]+)\t(?:\d+|Q0)\t([^\t]+)\t(-?\d+)"),
    re.compile(r"([^ \t]+)[ \t]+(?:\d+|Q0)[ \t]+([^ \t]+)[ \t]+(-?\d+)"),
)
Id = StrictStr | StrictInt
JSON = TypeAdapter(dict[Id, list[Id] | Id])
Pairs = Iterable[tuple[str, str]]  # of a query and a match


def matches(uri: str, items: Items) -> Matches:
    """The positives of a file, or of two qrels (`A.qrels,B.qrels`), with the ids of `items`.

    A CSV of pairs, and qrels of one direction, say both directions; JSON says those it names. How
    many ids are not among the items is told; positives of whom none is are refused.
    """
    out: Matches = {"i2t": {}, "t2i": {}}
    uris = [uri] if "," not in uri or store.exists(store.absolute(uri)) else uri.split(",")
    for part in uris:
        for direction, of_query in _read(part, items, both=len(uris) == 1).items():
            for query, found in of_query.items():
                out[direction].setdefault(query, []).extend(found)
    _tell(uri, out, items)
    return out


def _tell(uri: str, found: Matches, items: Items) -> None:
    """How many listed ids are not here; of runs, how many queries, as lists hold few candidates."""
    if isinstance(items, RunItems):
        for direction in (d for d in DIRECTIONS if items.lists[d]):
            queries, candidates = items.rows(direction)
            if not (of_query := found[direction]):
                LOG.warning("%s names no query of %s; its run is not measured", uri, direction)
                continue
            listed = f"{uri}, queries of {direction}"
            ids.known(of_query, queries, listed, "; they count as not found")
            ids.known(queries, of_query, f"the run {direction}", "; without positives, left out")
            if {match for of in of_query.values() for match in of}.isdisjoint(candidates):
                LOG.warning("%s: no list of %s holds a match of its query's", uri, direction)
        return
    sides = zip(("images", "texts"), DIRECTIONS, items.rows("i2t"), strict=True)
    for side, direction, here in sides:
        matches_ = {match for of in found[other(direction)].values() for match in of}
        lost = "; as queries they are left out, as matches they count as not found"
        ids.known([*found[direction], *sorted(matches_)], here, f"{uri}, {side}", lost)


def _read(uri: str, items: Items, both: bool) -> Matches:
    first = next(iter(text_files.lines(uri, WHAT)), (0, ""))[1].strip()
    if _qrel(first):
        return _directed(uri, _qrels(uri), items, both)
    if first.startswith(("{", "[")):
        return _of_json(uri, items)
    rows = csv_files.rows(uri, ("image_id", "caption_id"), WHAT)
    return _gathered("i2t", ((row["image_id"], row["caption_id"]) for _, row in rows), both=True)


def _gathered(direction: str, pairs: Pairs, both: bool) -> Matches:
    out: Matches = {"i2t": {}, "t2i": {}}
    for query, match in dict.fromkeys(pairs):
        out[direction].setdefault(query, []).append(match)
        if both:
            out[other(direction)].setdefault(match, []).append(query)
    return out


def _directed(uri: str, pairs: Iterable[tuple[str, str]], items: Items, both: bool) -> Matches:
    """Pairs of queries and matches of which the file does not say who is an image.

    Its name may, or else the ids.
    """
    pairs = list(pairs)
    said = [d for d in DIRECTIONS if d in store.name_of(uri)]
    if len(said) != 1:
        share = {d: _share(pairs, *items.rows(d)) for d in DIRECTIONS}
        said = [d for d in DIRECTIONS if share[d] == max(share.values())]
    if len(said) != 1:
        raise InputError(
            f"{uri} does not say whether its queries are images: the first pair is {pairs[:1]}, "
            "as many ids are known either way; call the file i2t.qrels or t2i.qrels"
        )
    return _gathered(said[0], pairs, both)


def _share(pairs: list[tuple[str, str]], queries: dict, candidates: dict) -> int:
    return sum((query in queries) + (match in candidates) for query, match in pairs)


def _qrels(uri: str) -> Pairs:
    for number, line in text_files.lines(uri, "qrels"):
        if (found := _qrel(line.strip())) is None:
            raise InputError(f"{uri} line {number} is {line!r}; write query 0 candidate relevance")
        if int(found[3]) > 0:
            yield found[1].strip(), found[2].strip()


def _qrel(line: str) -> re.Match | None:
    return next(filter(None, (form.fullmatch(line) for form in QRELS)), None)


def _of_json(uri: str, items: Items) -> Matches:
    found = text_files.parsed(uri, WHAT)
    if not isinstance(found, dict):
        raise InputError(f"{uri} is JSON, but no object; give {WHAT}")
    if not set(found) & set(DIRECTIONS):
        pairs = ((q, match) for q, of in _lists(uri, found, []).items() for match in of)
        return _directed(uri, pairs, items, both=True)
    if strange := [key for key in found if key not in DIRECTIONS]:
        raise InputError(f"{uri} holds {strange[0]!r} beside i2t or t2i; give {WHAT}")
    return {d: _lists(uri, of, [d]) for d, of in found.items()}


def _lists(uri: str, found: Any, place: list) -> dict[str, list[str]]:
    """{query: [match]}; one that is no list is a list of one."""
    try:
        of_query = JSON.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, [*place, *first["loc"][:1]]))
        raise InputError(
            f"{uri}: {at or 'the file'} must be a query's id with a list of ids: {first['msg']}"
        ) from error
    lists = ((q, of if isinstance(of, list) else [of]) for q, of in of_query.items())
    return {str(q): [*dict.fromkeys(map(str, of))] for q, of in lists if of}
