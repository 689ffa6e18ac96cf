"""Exclusion lists: the images and captions that `shard` or `evaluate` leave out, and why. A CSV:

    kind,id,reason
    image,1000268201_693b08cb0e,same pixels as 3637013_c675de7705 (test)
    caption,1000268201_693b08cb0e#2,misspelt

Other columns may follow; `halftone audit` writes such a list.
"""

from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.storage import csv_files

HEADER = ("kind", "id", "reason")
KINDS = ("image", "caption")
WHAT = "an exclusion list, as `halftone audit` writes it"


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
    out = []
    for line, row in csv_files.rows(uri, HEADER, WHAT):
        if row["kind"] not in KINDS or not row["id"]:
            raise InputError(
                f"{uri} line {line}: found kind {row['kind']!r} and id {row['id']!r}; write image "
                "or caption, and its id"
            )
        out.append(row)
    return out


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
