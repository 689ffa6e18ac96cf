"""Pairs that people judged: captions, or an image and a caption, and how well they agree.

Legend of the shape suffixes: P pairs, L links, which join two captions. A pair of captions is one
link; an image and a caption are a link for each of the image's other captions.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputError
from pipeline.sharding.reading import Shards
from pipeline.storage import csv_files, ids, store, text_files
from pipeline.storage.run_folder import RunFolder
from schemas.settings import CalibrateSettings

COLUMNS = "caption_id,caption_id,score or image_id,caption_id,score"
CAPTIONS = "image_id,caption_id,caption"
SIDE = re.compile(r"(image|caption)_?id_?[12]?")


@dataclass(frozen=True)
class Judged:
    """The judged pairs of which both sides are known."""

    image_P2: np.ndarray  # id of the image of either side
    judgement_P: np.ndarray  # in [0, 1]
    texts: list[str]  # those that links join
    pair_L: np.ndarray  # the pair of every link, rising
    text_L2: np.ndarray  # rows of `texts`
    left_out: int  # pairs with a side that is not known, or with nothing to compare

    def reduced(self, cosine_L: np.ndarray, reduce: str) -> np.ndarray:
        """Cosine (P,) of every pair: the max or the mean over its links."""
        starts = np.flatnonzero(np.diff(self.pair_L, prepend=-1))
        if reduce == "max":
            return np.maximum.reduceat(cosine_L, starts)
        return np.add.reduceat(cosine_L, starts) / np.diff(starts, append=len(self.pair_L))


def read(settings: CalibrateSettings, root: str) -> Judged:
    """The pairs in `calibrate.judgements`, with captions from a file or from the run folder."""
    if settings.judgements is None:
        raise InputError(f"no judgements are named; give --judgements FILE, a CSV with {COLUMNS}")
    judged = read_pairs(settings.judgements)
    if settings.captions:
        captions = _captions(settings.captions)
    else:
        samples = Shards(root).samples()
        captions = {c["caption_id"]: (s.image_id, c["text"]) for s in samples for c in s.captions}
    of_image: dict[str, list[str]] = {}
    for caption_id, (image_id, _) in captions.items():
        of_image.setdefault(image_id, []).append(caption_id)
    rows: dict[str, int] = {}  # of texts
    kept, links = [], []
    for kind, first, second, score in judged:
        firsts = of_image.get(first, ()) if kind == "image" else (first,)
        firsts = [f for f in firsts if f in captions and f != second]
        if second not in captions or not firsts:
            continue
        for caption_id in firsts:
            texts = captions[caption_id][1], captions[second][1]
            links.append((len(kept), *(rows.setdefault(text, len(rows)) for text in texts)))
        kept.append((captions[firsts[0]][0], captions[second][0], score))
    if not kept:
        raise InputError(
            f"none of the {len(judged)} judged pairs of {settings.judgements} is of captions known "
            f"here (the first: {judged[0][1]}, {judged[0][2]}); name their file, --captions FILE"
        )
    link_L3 = np.array(links, np.int64)
    image_P2 = np.array([pair[:2] for pair in kept])
    judgement_P = _scaled(np.array([pair[2] for pair in kept]), settings)
    left_out = len(judged) - len(kept)
    return Judged(image_P2, judgement_P, list(rows), link_L3[:, 0], link_L3[:, 1:], left_out)


def fingerprint_of_judgements(settings: CalibrateSettings, root: str) -> list:
    """What the judged pairs depend on: hashes of the files, or the version of the shards."""
    named = [(settings.judgements, COLUMNS), (settings.captions, CAPTIONS)]
    read = [store.sha256(text_files.data(uri, what)) for uri, what in named if uri]
    return read if settings.captions else [*read, RunFolder(root).index("shard")["version"]]


def _scaled(score_P: np.ndarray, settings: CalibrateSettings) -> np.ndarray:
    """Scores as relevance: 0 at the lowest of the scale, 1 at the highest."""
    lowest = score_P.min() if settings.lowest is None else settings.lowest
    highest = score_P.max() if settings.highest is None else settings.highest
    if score_P.min() == score_P.max() or lowest >= highest:
        raise InputError(
            f"scores from {score_P.min():g} to {score_P.max():g} on a scale from {lowest:g} to "
            f"{highest:g} order nothing; judge pairs that differ, or mend the scale"
        )
    if score_P.min() < lowest or score_P.max() > highest:
        raise InputError(
            f"scores from {score_P.min():g} to {score_P.max():g} leave the scale from {lowest:g} "
            f"to {highest:g}; mend calibrate.lowest or calibrate.highest"
        )
    return (score_P - lowest) / (highest - lowest)


def read_pairs(uri: str) -> list[tuple[str, str, str, float]]:
    """(kind of the first side, its id, caption id, score) of every line."""
    header, lines = csv_files.table(uri, f"judged pairs: {COLUMNS}")
    header = [name.casefold() for name in header]
    named = [(at, SIDE.fullmatch(name)) for at, name in enumerate(header)]
    sides = [(at, match[1]) for at, match in named if match]
    sides.sort(key=lambda side: side[1] == "caption")  # an image first
    if len(sides) != 2 or sides[1][1] != "caption" or header.count("score") != 1:
        raise InputError(f"{uri} has the columns {','.join(header)}; expected {COLUMNS}")
    out, at = [], header.index("score")
    last = max(at, *(column for column, _ in sides))
    for line, row in lines:
        if len(row) <= last:
            raise InputError(f"{uri} line {line} ends before its {header[len(row)]}")
        try:
            score = float(row[at])
        except ValueError:
            score = np.nan
        if not np.isfinite(score):
            raise InputError(f"{uri} line {line} has no score; write a number")
        out.append((sides[0][1], row[sides[0][0]], row[sides[1][0]], score))
    if not out:
        raise InputError(f"{uri} holds no judged pairs; expected lines of {COLUMNS}")
    return out


def _captions(uri: str) -> dict[str, tuple[str, str]]:
    """(image id, text) by caption id, from a CSV or JSON lines."""
    found = [*(_of_json_lines if ".jsonl" in store.name_of(uri) else _of_csv)(uri)]
    ids.unique([caption_id for caption_id, *_ in found], f"{uri}, caption ids")
    return {caption_id: (image_id, text) for caption_id, image_id, text in found}


def _of_csv(uri: str) -> Iterator[tuple[str, str, str]]:
    for _, row in csv_files.rows(uri, CAPTIONS.split(","), "a list of captions"):
        yield row["caption_id"], row["image_id"], row["caption"]


def _of_json_lines(uri: str) -> Iterator[tuple[str, str, str]]:
    for number, line in text_files.lines(uri, "captions"):
        try:
            row = json.loads(line)
            for caption_id, text in zip(row["caption_ids"], row["captions"], strict=True):
                yield str(caption_id), str(row["image_id"]), text
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{uri} line {number} holds no captions ({type(error).__name__}: {error}); "
                f"expected a CSV with {CAPTIONS}, or .jsonl lines with image_id, captions and "
                "caption_ids"
            ) from error
