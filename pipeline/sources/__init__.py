"""Annotation formats. To add one: a module with the functions below, and a line in `SOURCES`.

A source is a module with

    parts(settings) -> list[str]            names of its independent parts, in order (files, ranges)
    rows(settings, part) -> iterator        what a part says of each image (`annotations.row`)
    inputs(settings, uri) -> list           what else a part's rows depend on: stamps of its files
    SETTINGS                                settings of the source section that only some read
    load(uri) -> bytes                      optional: the bytes a row's uri stands for, where that
                                            is neither a file nor an http(s) address
    files_of(uri) -> tuple                  optional: the files these bytes lie in
    NAMED                                   optional: False where names of parts say no split
    prefixes(parts) -> list                 optional: of ids of images and of captions, by part
    one_image(uris) -> bool                 optional: whether rows of several parts with one id are
                                            of one image, whose captions they share out
    relevance(scenes, captions) -> array    optional: the true relevance, from the rows' facts
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import ModuleType

from pipeline.errors import InputError, did_you_mean
from pipeline.sources import (
    coco,
    csv,
    drawn,
    flickr_tokens,
    folder,
    huggingface,
    karpathy,
    part,
    precomp,
    webdataset,
)
from pipeline.sources.part import Part
from pipeline.sources.readers import fetch, guess, pictures
from pipeline.sources.readers.pictures import Stamps
from pipeline.sources.splits import DROP, Splits
from pipeline.storage import store
from schemas.settings import SourceSettings

SOURCES: dict[str, ModuleType] = {
    "drawn": drawn,
    "karpathy": karpathy,
    "coco": coco,
    "flickr_tokens": flickr_tokens,
    "csv": csv,
    "folder": folder,
    "webdataset": webdataset,
    "huggingface": huggingface,
    "precomp": precomp,
}


CUTS = {"holdout", "cut_val", "cut_test", "cut_seed"}
COMMON = {"kind", "path", "split", "splits", *CUTS}  # that every source reads
OF_ADDRESSES = {name for name in SourceSettings.model_fields if name.startswith("fetch_")}
FETCHING = ("csv", "coco", "huggingface")  # whose rows may be addresses


def source(kind: str) -> ModuleType:
    """The source module of a kind, or a sentence that names the kinds there are."""
    if kind not in SOURCES:
        raise InputError(f"unknown source.kind {kind!r}{did_you_mean(kind, SOURCES)}")
    return SOURCES[kind]


def kind_of(path: str) -> str:
    """The kind of source that a path is, from what lies there."""
    return guess.kind_of(path)


def read_by(kind: str) -> set[str]:
    """The settings of the source section that a kind reads."""
    return COMMON | source(kind).SETTINGS | (OF_ADDRESSES if kind in FETCHING else set())


def parts(settings: SourceSettings) -> list[Part]:
    """The independent parts of a source, in order."""
    module = source(settings.kind)
    found = part.of(module.parts(settings), named=getattr(module, "NAMED", True))
    if settings.images:  # all paths are relative to one folder
        found = [replace(one, prefix="") for one in found]
    if hasattr(module, "prefixes"):
        pairs = zip(found, module.prefixes(found), strict=True)
        return [replace(one, prefix=images, captions=texts) for one, (images, texts) in pairs]
    return found


def inputs(settings: SourceSettings, one: Part) -> list:
    """What a part's rows depend on, beside the settings (JSON-able)."""
    return [asdict(one), *source(settings.kind).inputs(settings, one.uri)]


def rows(settings: SourceSettings, one: Part, splits: Splits) -> Iterator[dict]:
    """Manifest rows of a part, without those that are dropped; `splits` counts them all."""
    stamps, files_of = Stamps(), _files_of(settings.kind)
    for row in source(settings.kind).rows(settings, one):
        row["split"] = splits.of(row["split"], row.pop("named"), usable=not row["problem"])
        if row["split"] != DROP:
            row["stamp"] = stamps.of(files_of(row["uri"]))
            yield {"width": None, "height": None, "sha256": None, "source": settings.kind, **row}


def changed(kind: str, uris: list[str], stamps: list[str | None]) -> dict[str, str]:
    """The rows' uris whose files are there and not as they were, with the stamps of now."""
    now, files_of = Stamps(), _files_of(kind)
    found = ((uri, before, now.of(files_of(uri))) for uri, before in zip(uris, stamps, strict=True))
    return {uri: stamp for uri, before, stamp in found if stamp is not None and stamp != before}


def _files_of(kind: str) -> Callable[[str], tuple[str, ...]]:
    return getattr(source(kind), "files_of", lambda uri: (uri,))


def missing(uri: str) -> str:
    """What there is in the place of a file that is not there, in words; '' where nothing is."""
    if pictures.DRIVE.match(uri):
        return " (a path of Windows: write paths relative to source.images)"
    near, _ = pictures.alike(uri)
    return f" (there is {store.name_of(near)})" if near else ""


def load(kind: str, uri: str, settings: SourceSettings) -> bytes:
    """The bytes a manifest row's uri stands for; may be called from many threads.

    Raises OSError, ValueError or InputError; a message's words before the first colon say why.
    """
    if fetch.is_address(uri):
        return fetch.fetch(uri, settings)
    return getattr(source(kind), "load", store.read_bytes)(uri)
