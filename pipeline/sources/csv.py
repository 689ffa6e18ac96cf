"""Tables of captions: .csv, .tsv or .parquet, a row an image, or a caption of one.

`source.path` may name several files (`data/*.parquet`); each is a part, and the rows of an image
are gathered inside its part. The image column holds paths, relative to `source.images` or to the
table's folder, whole URIs, or, in Parquet, the images' bytes (alone, or in a struct under `bytes`).
The caption column holds a text or a list of them, in .csv and .tsv as JSON. An image is called by
`source.id_column`, else after its path, else after its table and row.
"""

import csv
import json
import sys
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations, parquet, tables
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a .csv, .tsv or .parquet file, or a pattern of such files (data/*.csv)"
inputs = annotations.stamp_of_part
DELIMITERS = {".csv": ",", ".tsv": "\t"}

csv.field_size_limit(sys.maxsize)  # a caption that is too long is the shard stage's to refuse


def parts(settings: SourceSettings) -> list[str]:
    """The tables, sorted by name."""
    return annotations.files(settings, EXPECTED)


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
    return tables.images(_records(settings, part), part, "csv")


def load(uri: str) -> bytes:
    """The bytes in a cell of a Parquet table, or those of an image file."""
    data = parquet.cell_bytes(uri)
    return store.read_bytes(uri) if data is None else data


def _records(settings: SourceSettings, part: str) -> Iterator[tables.Record]:
    folder = annotations.image_folder(settings) if settings.images else part.rsplit("/", 1)[0]
    table, _, ending = store.name_of(part).rpartition(".")
    split_of_all = settings.split or annotations.split_of(part) or "train"
    in_cells, values = _read(settings, part, f".{ending.lower()}")
    column = settings.image_column
    for number, (image, caption, split, image_id) in enumerate(values):
        path, uri = None, parquet.cell_uri(part, column, number)
        if not in_cells:
            path = annotations.image_path(image, column, f"{part} row {number + 1}")
            uri = annotations.image_uri(folder, path)
        captions, name = annotations.texts(caption), f"{table}-{number:06d}"
        split = tables.text(split) or split_of_all
        yield tables.Record(uri, path, captions, split, tables.text(image_id), name)


def _read(settings: SourceSettings, uri: str, ending: str) -> tuple[bool, Iterator[tuple]]:
    """Whether the images are in the table; image, caption, split and id of each row."""
    if ending in DELIMITERS:
        return False, _read_text(settings, uri, DELIMITERS[ending])
    if ending != ".parquet":
        raise InputError(f"{uri} is neither .csv, .tsv nor .parquet; expected {EXPECTED}")
    image, *others = tables.columns(settings, parquet.column_names(uri), uri)
    in_cells = parquet.holds_bytes(uri, image)
    return in_cells, parquet.rows(uri, [None if in_cells else image, *others])


def _read_text(settings: SourceSettings, uri: str, delimiter: str) -> Iterator[tuple]:
    lines = (line + "\n" for line in annotations.lines(uri))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        columns = tables.columns(settings, header, uri)
        places = [None if column is None else header.index(column) for column in columns]
        for row in reader:
            if row:
                cells: list = [row[p] if p is not None and p < len(row) else None for p in places]
                cells[1] = _listed(cells[1])
                yield tuple(cells)
    except csv.Error as error:
        raise InputError(f"{uri} line {reader.line_num}: {error}; mend the quotes there") from None


def _listed(caption: str | None) -> str | list[str] | None:
    """The texts of a cell that is a JSON list of texts, else the cell as it is."""
    if caption and caption.startswith('["') and caption.endswith('"]'):
        try:
            captions = json.loads(caption)
        except json.JSONDecodeError:
            return caption
        if all(isinstance(text, str) for text in captions):
            return captions
    return caption
