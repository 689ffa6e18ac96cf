"""What people said about relevance: a fitted map, and single pairs that they decided.

Files at URIs that settings name. A local file is read again when it has changed, a remote one once
a process; `contents` is what a fingerprint holds of it.
"""

import functools
from typing import NamedTuple

from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.storage import csv_files, store
from schemas.relevance import Calibration

HEADER = ("image_id", "caption_id", "relevance")


class Override(NamedTuple):
    """A pair whose relevance people decided."""

    image_id: str
    caption_id: str
    relevance: float


def fingerprint_of_file(uri: str | None, what: str) -> str | None:
    """Hash of a file; None where there is none to read."""
    return None if uri is None else store.sha256(_bytes(uri, what))


def calibration(uri: str) -> Calibration:
    """The fitted map in a JSON file."""
    return _calibration(uri, _stamp(uri, "calibration"))


def overrides(uri: str) -> tuple[Override, ...]:
    """The decided pairs in a CSV with the columns image_id, caption_id and relevance.

    Other columns may follow. Of a pair that is there twice the last line counts; one whose
    relevance is empty is not decided.
    """
    return _overrides(uri, _stamp(uri, "overrides"))


def _stamp(uri: str, what: str) -> tuple:
    try:
        return tuple(store.stamp(uri)) if store.is_local(uri) else ()
    except OSError as error:
        raise _missing(uri, what) from error


def _bytes(uri: str, what: str) -> bytes:
    try:
        return store.read_bytes(uri)
    except OSError as error:
        raise _missing(uri, what) from error


def _missing(uri: str, what: str) -> InputError:
    return InputError(f"label.{what} names {uri}, where there is no file; give one or leave it out")


@functools.lru_cache(maxsize=4)
def _calibration(uri: str, stamp: tuple) -> Calibration:
    try:
        return Calibration.model_validate_json(_bytes(uri, "calibration"))
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "its fields"
        raise InputError(
            f"{uri} is no fitted map: {where}: {found['msg']}; give a JSON file with map "
            "(logistic with centre and width, or isotonic with knots and values)"
        ) from error


@functools.lru_cache(maxsize=4)
def _overrides(uri: str, stamp: tuple) -> tuple[Override, ...]:
    found = {}
    for line, row in csv_files.rows(uri, HEADER, "a list of decided pairs"):
        if row["relevance"] != "":
            pair = row["image_id"], row["caption_id"]
            found[pair] = _relevance(row["relevance"], uri, line)
    return tuple(Override(*pair, value) for pair, value in found.items())


def _relevance(text: str | None, uri: str, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"{uri} line {line}: relevance {text!r}; write a number from 0 to 1")
    return value
