"""Annotation formats. To add one: a module with the functions below, and a line in `SOURCES`.

A source is a module with

    parts(settings) -> list[str]            names of its independent parts, in order (files, ranges)
    rows(settings, part) -> iterator        manifest rows of a part, as dictionaries
    inputs(settings) -> list[str]           URIs of the files read, to notice that one was changed
    load(uri) -> bytes                      optional: the bytes a row's uri stands for
    relevance(scenes, captions) -> array    optional: the true relevance, from the rows' facts
"""

from types import ModuleType

from pipeline._errors import InputError, did_you_mean
from pipeline.sources import csv, drawn, flickr_tokens, karpathy, precomp

SOURCES: dict[str, ModuleType] = {
    "drawn": drawn,
    "karpathy": karpathy,
    "flickr_tokens": flickr_tokens,
    "csv": csv,
    "precomp": precomp,
}


def source(kind: str) -> ModuleType:
    """The source module of a kind, or a sentence that names the kinds there are."""
    if kind not in SOURCES:
        raise InputError(f"unknown source.kind {kind!r}{did_you_mean(kind, SOURCES)}")
    return SOURCES[kind]
