"""Tables of captions: text, JSON lines or Parquet, a row an image, or a caption of one.

`source.path` may name several files (`data/*.parquet`); each is a part, and the rows of an image
are gathered inside its part. In text a comma, a tab, a semicolon or a bar separates, which the
header shows. The image column holds paths, relative to `source.images` or to the table's folder,
whole URIs, or, in Parquet, the images' bytes (alone, or in a struct under `bytes`). The caption
column holds a text or a list of them, in a table of text as JSON or as Python prints it. An image
is called by `source.id_column`, else after its path, else after its table and row.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from pipeline.errors import InputError
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, cells, parquet, tables
from pipeline.sources.readers.pictures import Folder
from pipeline.storage import csv_files, store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a table (.csv, .tsv, .txt, .jsonl, .json or .parquet), or a pattern (data/*.csv)"
SETTINGS = {
    *("images", "image_column", "caption_column", "split_column", "id_column"),
    *("delimiter", "quotes", "columns"),
}
inputs = annotations.stamp_of_part
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TEXT_ENDINGS = (".csv", ".tsv", ".tab", ".txt", ".psv")


def parts(settings: SourceSettings) -> list[str]:
    """The tables, sorted by name."""
    return annotations.files(settings, EXPECTED)


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
    return tables.images(_records(settings, part), part.uri, part.prefix)


def load(uri: str) -> bytes:
    """The bytes in a cell of a Parquet table, or those of an image file."""
    data = parquet.cell_bytes(uri)
    return store.read_bytes(uri) if data is None else data


def files_of(uri: str) -> tuple[str, ...]:
    """The table that a cell is in, or the image file itself."""
    return (parquet.table_of(uri) or uri,)


def _records(settings: SourceSettings, part: Part) -> Iterator[tables.Record]:
    table, columns, values = _read(settings, part.uri)
    folder = Folder(_folder(settings, part))
    for number, (where, image, caption, split, image_id) in enumerate(values):
        path, problem = None, None
        uri = parquet.cell_uri(part.uri, columns.image, number)
        if table != "images":
            written = cells.place(image)
            problem = None if written else f"no path: {where} has none in {columns.image!r}"
            path = folder.path(written) if written else None
            uri = folder.find(path) if path else f"{part.uri}#{where}"
        called = tables.identifier(image_id, columns.id, where)
        name = f"{part.name}-{number:06d}"
        captions = cells.captions(caption)
        yield tables.Record(uri, path, captions, split, called, name, problem)


def _folder(settings: SourceSettings, part: Part) -> str:
    return annotations.image_folder(settings) if settings.images else part.uri.rsplit("/", 1)[0]


Values = Iterator[tuple[Any, ...]]  # where, image, caption, split and id of each row


def _read(settings: SourceSettings, uri: str) -> tuple[str, tables.Columns, Values]:
    """What a table is ('images' where it holds them), its columns, the values of its rows."""
    name = store.name_of(uri).lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(settings, uri)
    if name.endswith(JSON_ENDINGS):
        return "records", *_read_records(settings, uri)
    if name.endswith(TEXT_ENDINGS):
        return "text", *_read_text(settings, uri)
    raise InputError(f"{uri} is no table that can be read; expected {EXPECTED}")


def _read_parquet(settings: SourceSettings, uri: str) -> tuple[str, tables.Columns, Values]:
    columns = tables.columns(settings, parquet.column_names(uri), uri)
    in_cells = parquet.holds_bytes(uri, columns.image)
    image, *others = columns
    found = parquet.rows(uri, [None if in_cells else image, *others], parquet.labels(uri))
    numbered = ((f"{uri} row {number}", *row) for number, row in enumerate(found, 1))
    return "images" if in_cells else "paths", columns, numbered


def _read_records(settings: SourceSettings, uri: str) -> tuple[tables.Columns, Values]:
    """Of JSON lines, or of one JSON list of records; each may name other columns."""
    records = _records_of(uri)
    where, first = next(records, (uri, None))
    if first is None:
        raise InputError(f"{uri} is empty; expected {EXPECTED}")
    columns = tables.columns(settings, list(first), where)

    def values() -> Values:
        for place, record in itertools.chain([(where, first)], records):
            own = columns
            if record.keys() != first.keys() and tables.fits(settings, list(record)):
                own = tables.columns(settings, list(record), place)
            yield place, *(record.get(name) for name in own)

    return columns, values()


def _records_of(uri: str) -> Iterator[tuple[str, dict]]:
    """Each record with its place."""
    if ".json" in store.name_of(uri).lower().removesuffix(".gz")[-5:]:
        numbered = enumerate(text_files.loosely_parsed(uri, EXPECTED, list), 1)
        records: Iterator = ((f"{uri} record {number}", record) for number, record in numbered)
    else:
        records = _of_lines(uri)
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where} is no record ({str(record)[:60]!r}); expected {{...}}")
        yield where, record


def _of_lines(uri: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_files.stream(uri, EXPECTED), 1):
        if line.strip():
            try:
                yield f"{uri} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{uri} line {number} is not valid JSON ({error.msg})") from None


def _read_text(settings: SourceSettings, uri: str) -> tuple[tables.Columns, Values]:
    table = csv_files.opened(
        uri,
        EXPECTED,
        lambda header: tables.fits(settings, header),
        sign=csv_files.SIGNS.get(settings.delimiter or "", settings.delimiter),
        quotes=settings.quotes,
        header=list(settings.columns) or None,
    )
    columns = tables.columns(settings, table.header, f"{uri} (its first line)")
    needed = table.header.index(columns.caption)
    places = [None if name is None else table.header.index(name) for name in columns]

    def values() -> Values:
        for line, row in table.rows():
            where = f"{uri} line {line}"
            given: list = [row[p] if p is not None and p < len(row) else None for p in places]
            if len(row) <= needed:
                given[1] = cells.Missing(f"{where} ends before its {columns.caption!r}")
            yield where, *given

    return columns, values()
