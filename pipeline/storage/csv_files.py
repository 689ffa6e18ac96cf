"""CSV files that people wrote: every one is read here, and refused with its line.

Cells are separated by commas, semicolons, tabs, bars or blanks, whichever the first line has most
of; blanks around a cell are none of it.
"""

import csv
import io
from collections.abc import Iterator, Sequence

from pipeline.errors import InputError
from pipeline.storage import text_files

SEPARATORS = ",;\t|"  # or blanks, where there is none of these


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
    """The names in the first line, and (line, cells) of the others but empty ones.

    Spreadsheets write cleared rows as commas alone: those are empty too.
    """
    text, skipped = text_files.text(uri, what), 0
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep=") and len(first.strip()) == len("sep=,"):
        text, skipped = rest, 1  # a spreadsheet's own word on what separates
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **_dialect(text))
    found = _lines(uri, reader, skipped)
    _, header = next(found, (0, []))
    return header, _within(uri, found, len(header))


def _needed(name: str, header: list[str], needed: Sequence[str]) -> str:
    """The needed column that a name stands for, written in other letters; else the name itself."""
    if name in needed:
        return name
    return next((n for n in needed if n not in header and n == name.casefold()), name)


def _dialect(text: str) -> dict:
    """What csv.reader is to know: of the separators that which the first line has most often."""
    start = text.lstrip("\r\n")
    first = text_files.LINE_END.split(start, 1)[0]
    most = max(SEPARATORS, key=first.count)
    return {"delimiter": most if most in first else " ", "skipinitialspace": True}


def _lines(uri: str, reader, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells without the blanks around them) of every row that is not empty."""
    begins = 1
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield reader.line_num + skipped, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{uri} line {begins + skipped} is not CSV ({error}); quote fields that hold what "
            "separates them, a quote or a line break"
        ) from error


def _within(uri: str, lines: Iterator[tuple[int, list[str]]], width: int) -> Iterator:
    for line, cells in lines:
        # What separates would cut a text off that is not quoted.
        if any(cells[width:]):
            raise InputError(
                f"{uri} line {line} has {len(cells)} fields, its first line {width} names; "
                "quote fields that hold what separates them"
            )
        yield line, cells
