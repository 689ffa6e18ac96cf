"""Who is a query, what is the gallery, which pairs count: the protocols of the field, as data.

Legend of the shape suffixes: Q queries, P pairs of a query and a positive of its.
"""

import re
import warnings
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation.intervals import Queries, bootstrap, figures
from pipeline.evaluation.results import Protocol, Result
from pipeline.evaluation.trec import RunScores
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.retrieval.ranks import Pairs
from pipeline.retrieval.scores import DIRECTIONS, Items, Matches, System


@dataclass(frozen=True)
class Definition:
    """Who is a query, what is the gallery, which pairs count."""

    about: str
    positives: str = "own"  # a caption's image and an image's captions; or those people added
    captions_per_image: int | None = None  # the first so many stay; None: all
    images: int | None = None  # that the gallery must have; None: any number
    folds: int = 1  # the gallery is cut into so many, in order, and figures are their mean


PROTOCOLS = {
    "own": Definition("all images and captions, their own pairs"),
    "flickr_1k": Definition("Flickr30k test", captions_per_image=5, images=1000),
    "coco_5k": Definition("COCO Karpathy test", captions_per_image=5, images=5000),
    "coco_1k": Definition("COCO Karpathy test", captions_per_image=5, images=5000, folds=5),
    "cxc": Definition("Crisscrossed Captions", "cxc", captions_per_image=5),
    "eccv_caption": Definition("ECCV Caption", "eccv", captions_per_image=5),
    "given": Definition("the pairs of a file", "given"),
}


def measure(
    system: System, names: list[str], given: Matches | None = None, resamples: int = 1000
) -> dict[str, Result]:
    """{name: Result} of a system under protocols; those of one gallery share a pass over it."""
    if given and isinstance(system, RunScores):
        system = cast(System, system.asked(given))
    tables: dict[str, Result] = {}
    galleries: dict[tuple, list[str]] = {}
    for name in names:
        if name not in PROTOCOLS:
            raise InputError(f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}")
        protocol = PROTOCOLS[name]
        galleries.setdefault((protocol.captions_per_image, protocol.folds), []).append(name)
    for (captions, folds), together in galleries.items():
        rows = system.items.first_captions(captions)
        dropped = len(system.items.text_ids) - len(rows[1])
        gallery = system.take(*rows) if dropped else system
        found: dict[str, list[dict[str, Queries]]] = {name: [] for name in together}
        for name in together:
            wanted, there = PROTOCOLS[name].images, len(gallery.items.image_ids)
            if wanted not in (None, there):
                said = f"{name} is of {wanted:,} images and this gallery has {there:,}"
                raise InputError(f"{said}; evaluate that split, or use the protocol own")
        parts = [gallery.take(*rows) for rows in gallery.items.folds(folds)] if folds > 1 else []
        for part in parts or [gallery]:
            matches = [_matches(PROTOCOLS[name].positives, part.items, given) for name in together]
            for name, queries in zip(together, _queries(part, matches), strict=True):
                found[name].append(queries)
        for name in together:
            about = _protocol(name, gallery.items, dropped, found[name])
            tables[name] = _result(name, found[name], about, resamples)
    return {name: tables[name] for name in names}


def _matches(kind: str, items: Items, given: Matches | None) -> Matches:
    """The positives of the queries that are in the gallery."""
    if kind == "own":
        return items.matches()
    if kind != "given":
        given = _of_coco(kind, items)
    elif given is None:
        raise InputError("the protocol given needs a file of pairs; name one with --positives")
    inside = {direction: set(items.ids(direction)[0]) for direction in DIRECTIONS}
    kept = {
        d: {q: list(dict.fromkeys(of)) for q, of in of_query.items() if q in inside[d]}
        for d, of_query in given.items()
    }
    if not any(kept.values()):
        raise InputError(
            f"none of the queries of {kind} is in this gallery, whose first image is "
            f"{items.image_ids[:1]} and caption {items.text_ids[:1]}; ids must be theirs"
        )
    return kept


def _of_coco(kind: str, items: Items) -> Matches:
    """The matches that `eccv_caption` holds, under the gallery's ids of COCO's numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like a faster JSON
            from eccv_caption import Metrics
    except ImportError as error:
        said = f"the matches of {kind} come with the package eccv-caption"
        raise InputError(f"{said}; pip install eccv-caption") from error
    images = {coco_number(image_id): image_id for image_id in items.image_ids}
    matches = getattr(Metrics(), f"{kind}_gts")
    i2t = {images.get(i, str(i)): [*map(str, texts)] for i, texts in matches["i2t"].items()}
    t2i = {str(t): [images.get(i, str(i)) for i in of] for t, of in matches["t2i"].items()}
    return {"i2t": i2t, "t2i": t2i}


def coco_number(image_id: str) -> int | None:
    """COCO's number in an image's id, such as 179765 in COCO_val2014_000000179765."""
    found = re.search(r"(\d+)(\.\w+)?$", image_id)
    return int(found[1]) if found else None


def _queries(system: System, matches: list[Matches]) -> list[dict[str, Queries]]:
    """Every query's metrics under each of several sets of matches, in one pass."""
    items = system.items
    out: list[dict[str, Queries]] = [{} for _ in matches]
    pairs = {d: [_pairs(m[d], *items.rows(d)) for m in matches] for d in DIRECTIONS}
    # All sets' pairs one after the other: where they stand is counted together.
    joined = (np.concatenate([p for p, _ in pairs[d]], axis=1) for d in DIRECTIONS)
    counted = system.ranks_of_both(*(Pairs(*pair_2P) for pair_2P in joined))
    for direction, stand in zip(DIRECTIONS, counted, strict=True):
        rows_of = items.rows(direction)[0]
        ends = np.cumsum([pair_2P.shape[1] for pair_2P, _ in pairs[direction]])[:-1]
        cut = zip(*(np.split(part, ends) for part in stand), strict=True)
        for number, (above_P, tied_P) in enumerate(cut):
            if of_query := matches[number][direction]:
                pair_2P, total_Q = pairs[direction][number]
                place = {rows_of[query]: n for n, query in enumerate(of_query)}
                query_P = np.array([place[row] for row in pair_2P[0]], np.int64)
                parts = query_P, above_P, tied_P, total_Q
                query, above, tied, total = map(torch.from_numpy, parts)
                found = per_query(query, above, tied, len(of_query), total_Q=total)
                values = {name: value_Q.numpy() for name, value_Q in found.items()}
                ids = np.array(list(of_query))
                out[number][direction] = Queries(ids, items.images_of(direction, ids), values)
    return out


def _pairs(
    of_query: dict[str, list[str]], queries: dict[str, int], candidates: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (2, P) of queries and positives in the gallery, and how many each query has in all."""
    every = ((query, match) for query, of_one in of_query.items() for match in of_one)
    found = [(queries[q], candidates[match]) for q, match in every if match in candidates]
    total_Q = np.array([len(of_one) for of_one in of_query.values()], np.int64)
    return np.array(found, np.int64).reshape(-1, 2).T, total_Q


def _result(name: str, folds: list[dict[str, Queries]], about: Protocol, resamples: int) -> Result:
    """Folds are equally large, so the mean of their means is the mean over all their queries."""
    joined = {d: _joined([fold[d] for fold in folds]) for d in folds[0]}
    means, between = figures(joined), bootstrap(joined, resamples)
    left_out = ["rsum"] if len(joined) < 2 else []
    if len(folds) > 1:  # a median over folds is not their median
        left_out += [key for key in means if "MedR" in key]
    for key in left_out:
        means.pop(key), between.pop(key, None)
    return Result(name, means, between, about)


def _joined(parts: list[Queries]) -> Queries:
    values = {name: np.concatenate([p.values[name] for p in parts]) for name in parts[0].values}
    ids, images = (np.concatenate([p[n] for p in parts]) for n in (0, 1))
    return Queries(ids, images, values)


def _protocol(name: str, items: Items, dropped: int, folds: list[dict[str, Queries]]) -> Protocol:
    of = PROTOCOLS[name]
    return Protocol(
        images=len(items.image_ids),
        captions=len(items.text_ids),
        captions_per_image=of.captions_per_image or "all",
        protocol=name,
        about=of.about,
        positives=of.positives,
        folds=of.folds,
        queries={d: sum(len(fold[d].query_ids) for fold in folds) for d in folds[0]},
        captions_dropped=dropped,
    )
