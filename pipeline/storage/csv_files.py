"""Tables of text as people and programs write them: which sign separates, and how quotes are meant.

A file is read in the one way in which all its lines have as many cells as the first, and refused
with the line where there is none, or where two ways give different tables. Files of any length are
read line by line; only those that hold a quote are gone through more than once.
"""

import csv
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import InputError
from pipeline.storage import text_files

csv.field_size_limit(sys.maxsize)  # a text that is too long is another's to refuse

SIGNS = {"comma": ",", "tab": "\t", "semicolon": ";", "bar": "|"}
Quotes = Literal["doubled", "backslash", "none"]
BLANKS = " "  # separate where no sign does
DOUBLED = re.compile(r'"(?:[^"]|"")*"')  # a cell whose quotes are closed in it
SLASHED = re.compile(r'"(?:[^"\\]|\\.)*"')
OPEN = -1
CLOSED = {  # a cell by whether it is whole with doubled quotes, and with slashes
    **{(True, False): "doubled", (False, True): "slashed"},
    **{(True, True): "either", (False, False): "bare"},
}
Row = tuple[int, list[str]]  # the line that it ends in, and its cells


class Empty(InputError):
    """A file without a line that is not blank."""


@dataclass(frozen=True)
class Table:
    """A file, and how it is to be read."""

    uri: str
    what: str  # in an error, what the file was to be
    sign: str
    quotes: Quotes
    header: list[str]
    begins: int  # lines before the first row of data

    def rows(self) -> Iterator[Row]:
        """Every row but empty ones; one with more cells than the header is refused."""
        for line, cells in _grid(self, self.quotes):
            # What separates would cut a text off that is not quoted.
            if any(map(str.strip, cells[len(self.header) :])):
                raise InputError(
                    f"{self.uri} line {line} has {len(cells)} cells, the header has "
                    f"{len(self.header)}; quote the cells that hold {self.sign!r}"
                )
            if any(map(str.strip, cells)):  # spreadsheets write cleared rows as commas alone
                yield line, cells


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
        found = opened(uri, what)
    except Empty:
        return [], iter(())
    return found.header, ((line, [cell.strip() for cell in row]) for line, row in found.rows())


def _needed(name: str, header: list[str], needed: Sequence[str]) -> str:
    """The needed column that a name stands for, written in other letters; else the name itself."""
    if name in needed:
        return name
    return next((n for n in needed if n not in header and n == name.casefold()), name)


def opened(
    uri: str,
    what: str,
    fits: Callable[[list[str]], bool] | None = None,
    *,
    sign: str | None = None,
    quotes: Quotes | None = None,
    header: list[str] | None = None,
) -> Table:
    """How a file is to be read; `fits` says whether a header has the columns that are needed.

    Without it the sign separates that the header has most of, or blanks, where it has none.
    `sign`, `quotes` and `header` (of a file without one) are what somebody knows of the file.
    """
    first, begins, said = _first(uri, what)
    sign = sign or said
    if header is not None:
        sign, begins = sign or max(SIGNS.values(), key=first.count), begins - 1
    else:
        sign, header = _sign_of(first, fits, sign)
    table = Table(uri, what, sign, "none", header, begins)
    return Table(uri, what, sign, quotes or _quotes_of(table), header, begins)


def _first(uri: str, what: str) -> tuple[str, int, str | None]:
    """The first line that is not blank, its number, and what a spreadsheet says separates."""
    said = None
    for number, line in enumerate(text_files.stream(uri, what), 1):
        if said is None and (found := re.fullmatch(r"sep=(.)", line, re.IGNORECASE)):
            said = found[1]
        elif line.strip():
            return line, number, said
    raise Empty(f"{uri} is empty; give {what}")


def _sign_of(
    first: str, fits: Callable[[list[str]], bool] | None, sign: str | None
) -> tuple[str, list[str]]:
    """What separates, and the header's names: those that fit, else the most names there can be."""
    headers = {s: _names(first, s) for s in ([sign] if sign else SIGNS.values())}
    fitting = next((s for s, names in headers.items() if fits and fits(names)), None)
    found = fitting or max(headers, key=lambda s: len(headers[s]))
    blanks = _names(first, BLANKS)
    if not fitting and not sign and (fits(blanks) if fits else len(headers[found]) == 1):
        return BLANKS, blanks
    return found, headers[found]


def _names(line: str, sign: str) -> list[str]:
    reader = csv.reader([line], delimiter=sign, skipinitialspace=True)
    return [name.strip() for name in next(reader, [])]


def _grid(table: Table, quotes: Quotes) -> Iterator[Row]:
    """The rows after the header, read in one way."""
    lines = itertools.islice(text_files.stream(table.uri, table.what), table.begins, None)
    how: dict = {"delimiter": table.sign, "strict": True}
    if quotes == "none":
        how = {"delimiter": table.sign, "quoting": csv.QUOTE_NONE}
    elif quotes == "backslash":
        how |= {"doublequote": False, "escapechar": "\\"}
    # A bar with blanks around it separates without them.
    how["skipinitialspace"] = table.sign in "| " or quotes != "none"
    reader, begins = csv.reader((f"{line}\n" for line in lines), **how), 1
    try:
        for cells in reader:
            yield table.begins + reader.line_num, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{table.uri} line {table.begins + begins} is not CSV ({error}); quote cells that hold "
            "what separates them, a quote or a line break"
        ) from error


def _quotes_of(table: Table) -> Quotes:
    """How quotes are meant: the one way that gives every line as many cells as the header."""
    kinds = _kinds(table)
    if not kinds:
        return "none"
    plain = _count(table, "none")
    unsaid = "pairs" in kinds and not kinds & {"doubled", "slashed"}
    if plain is not None and not kinds & {"bare"} and not {"doubled", "slashed"} <= kinds:
        if unsaid:
            raise _several(table, ["doubled", "backslash"])
        return "backslash" if "slashed" in kinds else "doubled"  # all are closed in their lines
    doubled = _count(table, "doubled")
    if plain is not None and plain == doubled and not unsaid:
        return "doubled"  # bare quotes inside a cell stay as they are
    if plain is not None and table.sign == "\t":
        return "none"  # as the standard says of tabs
    slashed = _count(table, "backslash") if kinds & {"slash", "slashed", "pairs"} else None
    if doubled == OPEN and slashed in (None, OPEN):
        return "doubled"  # where it is read, it is told where the quote was opened
    ways: dict[Quotes, int | None] = {"none": plain, "doubled": doubled, "backslash": slashed}
    found = [way for way, rows in ways.items() if rows not in (None, OPEN)]
    if len(found) > 1:
        raise _several(table, found)
    return found[0] if found else "doubled"


def _several(table: Table, ways: list[Quotes]) -> InputError:
    return InputError(
        f"{table.uri}: its quotes can be meant in {len(ways)} ways ({', '.join(ways)}), with "
        "different rows; say which by source.quotes"
    )


def _kinds(table: Table) -> set[str]:
    """The quotes a file holds: cells closed by doubling, slashes or 'either', and 'bare' ones.

    And whether any follows a 'slash' where cells are not closed in their line, and whether all
    slashes beside quotes come in 'pairs', so that each may be one or two.
    """
    found: set[str] = set()
    runs: set[int] = set()  # whether a run of slashes is odd
    for line in itertools.islice(text_files.stream(table.uri, table.what), table.begins, None):
        if '"' not in line:
            continue
        runs |= {len(run) % 2 for run in re.findall(r"\\+", line)}
        for cell in map(str.strip, line.split(table.sign)):
            if '"' in cell:
                ways = bool(DOUBLED.fullmatch(cell)), bool(SLASHED.fullmatch(cell))
                found.add(CLOSED[ways])
        if '\\"' in line and "bare" in found:
            found.add("slash")
            break
    return found | {"pairs"} if runs == {0} else found


def _count(table: Table, quotes: Quotes) -> int | None:
    """The number of rows read in one way, None where not all have as many cells as the header.

    `OPEN` where all have, but for a quote that is never closed.
    """
    rows = 0
    try:
        for _, cells in _grid(table, quotes):
            if cells and len(cells) != len(table.header):
                return None
            rows += bool(cells)
    except InputError as error:
        return OPEN if "unexpected end of data" in str(error) else None
    return rows
