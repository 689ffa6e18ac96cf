"""Errors a person can act on."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Bad input; the message says what was found, what was expected and what to do."""


class Unreachable(InputError):
    """Storage did not answer: with the same input another try may do better."""


class StageMissing(InputError):
    """An earlier stage has not run yet; the message names it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or the list of what is known, to end an error's sentence with."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
