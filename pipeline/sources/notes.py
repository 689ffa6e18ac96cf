"""What a source passed over while it read a part, counted, for the stage's line.

Sources say it where they meet it; whoever reads a part collects what was said meanwhile.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

Notes = dict[str, list]  # what was passed over: [how often, the first of it]
_HEARD: ContextVar[Notes | None] = ContextVar("notes", default=None)


def add(what: str, example: str, times: int = 1) -> None:
    """Something was passed over: what kind of thing, and which."""
    heard = _HEARD.get()
    if heard is not None:
        heard.setdefault(what, [0, example])[0] += times


@contextlib.contextmanager
def collected() -> Iterator[Notes]:
    """What is said while it is entered."""
    heard: Notes = {}
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)


def summed(parts: list[Notes]) -> Notes:
    """The notes of several parts as one."""
    out: Notes = {}
    for part in parts:
        for what, (times, example) in part.items():
            out.setdefault(what, [0, example])[0] += times
    return out


def told(found: Notes) -> list[str]:
    """A line each: 'files that are no images: 2, the first notes.heic'."""
    return [f"{what}: {n:,}, the first {example}" for what, (n, example) in sorted(found.items())]
