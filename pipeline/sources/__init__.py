"""Annotation formats. To add one: a module with the functions below, and a line in `SOURCES`.

A source is a module with

    parts(settings) -> list[str]            names of its independent parts, in order (files, ranges)
    rows(settings, part) -> iterator        manifest rows of a part, as dictionaries
    inputs(settings, part) -> list          what else a part's rows depend on: stamps of its files
    load(uri) -> bytes                      optional: the bytes a row's uri stands for, where that
                                            is neither a file nor an http(s) address
    one_image(uris) -> bool                 optional: whether rows of several parts with one id are
                                            of one image, their captions to be put together
    TWICE                                   optional: what to do about an id that two parts have
    relevance(scenes, captions) -> array    optional: the true relevance, from the rows' facts

One bad row among good ones is set aside: its uri is `problems.uri(reason)`, and `shard` counts it.
What is wrong with a whole part is raised, as `InputError`.
"""

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
    precomp,
    webdataset,
)
from pipeline.sources.readers import fetch, problems
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


def source(kind: str) -> ModuleType:
    """The source module of a kind, or a sentence that names the kinds there are."""
    if kind not in SOURCES:
        raise InputError(f"unknown source.kind {kind!r}{did_you_mean(kind, SOURCES)}")
    return SOURCES[kind]


def set_aside(uri: str) -> str | None:
    """Why the source set a row with this uri aside; None where it did not."""
    return problems.reason(uri)


def load(kind: str, uri: str, settings: SourceSettings) -> bytes:
    """The bytes a manifest row's uri stands for; may be called from many threads.

    Raises OSError, ValueError or InputError; a message's words before the first colon say why.
    """
    if reason := problems.reason(uri):
        raise InputError(reason)
    if fetch.is_address(uri):
        return fetch.fetch(uri, settings)
    return getattr(source(kind), "load", store.read_bytes)(uri)
