"""Tables that people wrote for one purpose: every one is read here, and refused with its line.

As `delimited` reads any table; blanks around a cell are none of it.
"""

from collections.abc import Iterator, Sequence

from pipeline.errors import InputError
from pipeline.storage import delimited


def rows(uri: str, needed: Sequence[str], what: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of every row; the first line must name the `needed` columns.

    In any case of letters. Others may follow, and be missing in a row. `what` says in an error
    what the file was to be: "an exclusion list".
    """
    header, lines = table(uri, what)
    header = [_needed(name, header, needed) for name in header]
    if missing := [name for name in needed if name not in header]:
        raise InputError(
            f"{uri} has no column {missing[0]!r}; the first line of {what} names "
            f"{','.join(needed)} (others may follow), found {','.join(header) or 'nothing'}"
        )
    if twice := [name for name in needed if header.count(name) > 1]:
        raise InputError(f"{uri} has two columns {twice[0]!r}; leave one of {what}")
    for number, cells in lines:
        row = dict(zip(header, cells, strict=False))
        if missing := [name for name in needed if name not in row]:
            raise InputError(f"{uri} line {number} ends before its {missing[0]}: {','.join(cells)}")
        yield number, dict.fromkeys(header, "") | row


def table(uri: str, what: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names in the first line, and (line, cells) of the others but empty ones."""
    try:
        found = delimited.opened(uri, what)
    except delimited.Empty:
        return [], iter(())
    return found.header, ((line, [cell.strip() for cell in row]) for line, row in found.rows())


def _needed(name: str, header: list[str], needed: Sequence[str]) -> str:
    """The needed column that a name stands for, written in other letters; else the name itself."""
    if name in needed:
        return name
    return next((n for n in needed if n not in header and n == name.casefold()), name)
