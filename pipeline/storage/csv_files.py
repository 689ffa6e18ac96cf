"""CSV files that people wrote: every one is read here, and refused with its line."""

import csv
import gzip
import io
from collections.abc import Iterator, Sequence

from pipeline.errors import InputError
from pipeline.storage import store


def rows(uri: str, needed: Sequence[str], what: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of every row; the first line must name the `needed` columns.

    Others may follow, and be missing in a row. `what` says in an error what the file was to
    be: "an exclusion list".
    """
    header, lines = table(uri, what)
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
    reader = csv.reader(io.StringIO(text(uri, what), newline=""), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        try:
            yield from ((reader.line_num, cells) for cells in reader if any(cells))
        except csv.Error as error:
            raise InputError(
                f"{uri} line {reader.line_num} is not CSV ({error}); quote fields that hold a "
                "comma, a quote or a line break"
            ) from error

    def within(width: int) -> Iterator[tuple[int, list[str]]]:
        for line, cells in found:
            # A comma in a text that is not quoted would cut the text off there.
            if any(cells[width:]):
                raise InputError(
                    f"{uri} line {line} has {len(cells)} fields, its first line {width} names; "
                    "quote fields that hold a comma"
                )
            yield line, cells

    found = lines()
    _, header = next(found, (0, []))
    if len(header) == 1 and (other := set(header[0]) & set(";\t|")):
        raise InputError(f"{uri} is separated by {min(other)!r}; save {what} with commas")
    return [name.strip() for name in header], within(len(header))


def text(uri: str, what: str) -> str:
    """The whole text of a file, gzipped or not, without a byte order mark."""
    packed = data(uri, what)
    try:
        return (gzip.decompress(packed) if uri.endswith(".gz") else packed).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} is not UTF-8 ({error}); save {what} as UTF-8") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{uri} is not gzip, or torn: {error}; pack it again") from error


def data(uri: str, what: str) -> bytes:
    """A file's bytes, or the sentence that it is not there."""
    try:
        return store.read_bytes(store.absolute(uri))
    except OSError as error:
        raise InputError(f"there is no file {uri}; give {what}") from error
