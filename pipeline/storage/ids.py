"""Ids in files that people wrote: none is there twice, and who is not here is told."""

import functools
import logging
from collections.abc import Container, Hashable, Iterable, Sequence

from pipeline.errors import InputError

LOG = logging.getLogger(__name__)


def unique(ids: Sequence[str], where: str) -> None:
    """Refuses ids of which one is empty or there twice; `where` names them in the error."""
    if "" in ids:
        raise InputError(
            f"{where}: the id in place {ids.index('') + 1} is empty; give each its own"
        )
    if len(set(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for place, id_ in enumerate(ids, 1):
        if id_ in first:
            raise InputError(
                f"{where}: {len(ids) - len(set(ids)):,} ids are there twice, the first {id_!r} in "
                f"places {first[id_]} and {place}; give each its own"
            )
        first[id_] = place


def known(
    listed: Iterable[Hashable],
    here: Container,
    where: str,
    also: str = "",
    *,
    refuse: bool = True,
) -> None:
    """Tells how many of the listed ids are not here, and the first; may refuse where none is.

    `also` goes on with the sentence: what becomes of them.
    """
    listed = list(dict.fromkeys(listed))
    lost = [id_ for id_ in listed if id_ not in here]
    if not lost:
        return
    said = f"{where}: {len(lost):,} of {len(listed):,} listed ids are not here"
    said += f", the first {lost[0]!r}"
    if len(lost) == len(listed) and refuse:
        one = next(iter(here), None) if isinstance(here, Iterable) else None
        raise InputError(said + (f"; ids here are such as {one!r}" if one is not None else ""))
    _tell(said + also)


@functools.cache
def _tell(said: str) -> None:
    """Once a process: what is read again is told once."""
    LOG.warning("%s", said)
