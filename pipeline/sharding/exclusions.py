"""Exclusion lists: the images and captions that `shard` or `evaluate` leave out, and why. A CSV:

    kind,id,reason
    image,1000268201_693b08cb0e,same pixels as 3637013_c675de7705 (test)
    caption,1000268201_693b08cb0e#2,misspelt

Other columns may follow; `halftone audit` writes such a list.
"""

import csv
import io
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.storage import store

HEADER = ("kind", "id", "reason")
KINDS = ("image", "caption")


class Excluded(NamedTuple):
    """What leaves an evaluation."""

    images: frozenset[str] = frozenset()
    captions: frozenset[str] = frozenset()


def read(uri: str) -> dict[tuple[str, str], str]:
    """The reason of every (kind, id) on the list; the first one where an id is there twice."""
    out: dict[tuple[str, str], str] = {}
    for row in rows(uri):
        out.setdefault((row["kind"], row["id"]), row["reason"])
    return out


def rows(uri: str) -> list[dict[str, str]]:
    """The lines of the list, checked, with all their columns."""
    reader = csv.DictReader(io.StringIO(_text(uri), newline=""), strict=True, restval="")
    out = []
    try:
        missing = [name for name in HEADER if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                f"{uri} has no column {missing[0]!r}; its first line must name "
                f"{','.join(HEADER)} (others may follow)"
            )
        for row in reader:
            if row["kind"] not in KINDS or not row["id"]:
                raise InputError(
                    f"{uri} line {reader.line_num}: found kind {row['kind']!r} and id "
                    f"{row['id']!r}; write image or caption, and its id"
                )
            out.append(row)
    except csv.Error as error:
        raise InputError(
            f"{uri} line {reader.line_num} is not CSV ({error}); quote fields that hold a comma, "
            "a quote or a line break"
        ) from error
    return out


def _text(uri: str) -> str:
    try:
        return store.read_bytes(store.absolute(uri)).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"no exclusion list at {uri}; `halftone audit` writes one, or give a CSV with the "
            f"columns {','.join(HEADER)}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} is not UTF-8; save the exclusion list as UTF-8") from error


def excluded_from(uri: str, captions_by_image: dict[str, list[str]]) -> Excluded:
    """The listed images with their captions, the listed captions, and images left with none."""
    listed = read(uri)
    images = {
        image_id
        for image_id, captions in captions_by_image.items()
        if ("image", image_id) in listed or all(("caption", c) in listed for c in captions)
    }
    captions = {
        caption_id
        for image_id, captions in captions_by_image.items()
        for caption_id in captions
        if image_id in images or ("caption", caption_id) in listed
    }
    return Excluded(frozenset(images), frozenset(captions))
