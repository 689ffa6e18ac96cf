"""Exclusion lists: the images and captions that `shard` or `evaluate` leave out, and why. A CSV:

    kind,id,reason
    image,1000268201_693b08cb0e,same pixels as 3637013_c675de7705 (test)
    caption,1000268201_693b08cb0e#2,misspelt

Other columns may follow; `halftone audit` writes such a list.
"""

import unicodedata
from collections.abc import Container, Iterable
from typing import NamedTuple

from pipeline.errors import InputError
from pipeline.storage import csv_files, ids, parquet
from pipeline.storage.run_folder import Files
from schemas.settings import EvaluateSettings

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
        id_ = unicodedata.normalize("NFC", row["id"])  # as the manifest writes ids
        out.setdefault((row["kind"], id_), row["reason"])
    return out


def rows(uri: str) -> list[dict[str, str]]:
    """The lines of the list, checked, with all their columns."""
    out = []
    for line, row in csv_files.rows(uri, HEADER, WHAT):
        if row["kind"] not in KINDS or not row["id"]:
            found = f"found kind {row['kind']!r} and id {row['id']!r}"
            raise InputError(f"{uri} line {line}: {found}; write image or caption, and its id")
        out.append(row)
    return out


def tell(
    uri: str,
    listed: Iterable[tuple[str, str]],
    here: Container,
    where: str,
    *,
    refuse: bool = False,
) -> None:
    """Says how many of the listed (kind, id) are not among those of `where`; may refuse none."""
    ids.known(listed, here, f"{uri}, of {where}", refuse=refuse)


def of_evaluation(settings: EvaluateSettings, vectors: Files) -> Excluded:
    """What `evaluate.exclude` takes out of the evaluated split.

    The listed images with their captions, the listed captions, and images left with none.
    """
    if settings.exclude is None:
        return Excluded()
    listed = read(settings.exclude)
    table = parquet.read_tables(vectors.uris, ["id", "image_id", "modality"]).to_pydict()
    captions: dict[str, list[str]] = {image_id: [] for image_id in table["image_id"]}
    for id_, image_id, modality in zip(*table.values(), strict=True):
        if modality == "text":
            captions[image_id].append(id_)
    there = {("image", image_id) for image_id in captions}
    there |= {("caption", id_) for own in captions.values() for id_ in own}
    tell(settings.exclude, listed, there, settings.split)
    images = {
        image_id
        for image_id, own in captions.items()
        if ("image", image_id) in listed or all(("caption", c) in listed for c in own)
    }
    if len(images) == len(captions):
        raise InputError(
            f"evaluate.exclude {settings.exclude} takes all {len(captions)} images of "
            f"{settings.split} out; evaluate another split or shorten the list"
        )
    pairs = ((image_id, c) for image_id, own in captions.items() for c in own)
    texts = {c for image_id, c in pairs if image_id in images or ("caption", c) in listed}
    return Excluded(frozenset(images), frozenset(texts))
