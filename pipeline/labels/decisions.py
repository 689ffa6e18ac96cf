"""What people said about relevance: a fitted map, and single pairs that they decided.

Files at URIs that settings name. A local file is read again when it has changed, a remote one once
a process.
"""

import contextlib
import functools
from collections.abc import Container
from typing import NamedTuple

from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.storage import csv_files, ids, store, text_files
from schemas.relevance import Calibration

HEADER = ("image_id", "caption_id", "relevance")


class Override(NamedTuple):
    """A pair whose relevance people decided."""

    image_id: str
    caption_id: str
    relevance: float


def calibration(uri: str) -> Calibration:
    """The fitted map in a JSON file."""
    return _calibration(uri, store.state(uri))


def overrides(uri: str) -> tuple[Override, ...]:
    """The decided pairs in a CSV with the columns image_id, caption_id and relevance.

    Other columns may follow. Of a pair that is there twice the last line counts; one whose
    relevance is empty is not decided.
    """
    return _overrides(uri, store.state(uri))


def tell(uri: str, images: Container[str], captions: Container[str]) -> None:
    """Says how many of the decided pairs are of an image or a caption that is not here."""
    listed = [(pair.image_id, pair.caption_id) for pair in overrides(uri)]
    here = {pair for pair in listed if pair[0] in images and pair[1] in captions}
    ids.known(listed, here, f"label.overrides {uri}")


@functools.lru_cache(maxsize=4)
def _calibration(uri: str, state: tuple) -> Calibration:
    try:
        return Calibration.model_validate_json(text_files.text(uri, "a fitted map"))
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "its fields"
        raise InputError(
            f"{uri} is no fitted map: {where}: {found['msg']}; give a JSON file with map "
            "(logistic with centre and width, or isotonic with knots and values)"
        ) from error


@functools.lru_cache(maxsize=4)
def _overrides(uri: str, state: tuple) -> tuple[Override, ...]:
    found = {}
    for line, row in csv_files.rows(uri, HEADER, "a list of decided pairs"):
        text, value = row["relevance"], -1.0
        with contextlib.suppress(ValueError):
            value = float(text)
        if text and not 0 <= value <= 1:
            raise InputError(f"{uri} line {line}: relevance {text!r}; write a number from 0 to 1")
        if text:
            found[row["image_id"], row["caption_id"]] = value
    return tuple(Override(*pair, value) for pair, value in found.items())
