"""Tables of captions: .csv, .tsv or .parquet, a row an image, or a caption of one.

`source.path` may name several files (`data/*.parquet`); each is a part, and the rows of an image
are gathered inside its part. Image paths are relative to `source.images`, or to the table's folder,
or whole URIs; an image is called after its path.
"""

import csv
import io
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import _store
from pipeline._errors import InputError, did_you_mean
from pipeline.sources import _annotations
from schemas.settings import SourceSettings

EXPECTED = "a .csv, .tsv or .parquet file, or a pattern of such files (data/*.csv)"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def parts(settings: SourceSettings) -> list[str]:
    """The tables, sorted by name."""
    return inputs(settings)


def inputs(settings: SourceSettings) -> list[str]:
    """The tables, sorted by name."""
    uri = _annotations.path(settings, EXPECTED)
    if not any(sign in uri for sign in "*?["):
        return [_annotations.file(settings, EXPECTED)]
    fs, pattern = fsspec.core.url_to_fs(uri)
    found = sorted(fs.glob(pattern))
    if not found:
        raise InputError(f"no file matches source.path {uri}; expected {EXPECTED}")
    return found if _store.is_local(uri) else [fs.unstrip_protocol(path) for path in found]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows, one for each image in the order of first appearance."""
    folder = _annotations.image_folder(settings) if settings.images else part.rsplit("/", 1)[0]
    images: dict[str, tuple[str, list[str]]] = {}
    for number, (path, captions, split) in enumerate(_table_rows(settings, part), 1):
        if not path or not isinstance(path, str):
            raise InputError(
                f"{part} row {number} has no path in {settings.image_column!r}; fill or drop it"
            )
        known, texts = images.setdefault(path, (split, []))
        if known != split:
            raise InputError(
                f"{part} row {number} puts {path!r} in split {split!r}, an earlier one in "
                f"{known!r}; give an image one split"
            )
        texts += captions
    for path, (split, texts) in images.items():
        image_id = _image_id(path)
        captions = [(f"{image_id}#{k}", text) for k, text in enumerate(texts)]
        yield _annotations.row(image_id, _image_uri(folder, path), split, captions, "csv")


def _table_rows(settings: SourceSettings, part: str) -> Iterator[tuple[str, list[str], str]]:
    """Image path, captions and split of each row of the table."""
    columns = [settings.image_column, settings.caption_column, settings.split_column]
    for image, caption, split in _read(part, columns):
        captions = caption if isinstance(caption, list) else [caption]
        texts = ["" if text is None else str(text) for text in captions]
        yield image, texts, split or "train"


def _read(uri: str, columns: list[str]) -> Iterator[tuple]:
    ending = "." + _store.name_of(uri).rsplit(".", 1)[-1].lower()
    if ending == ".parquet":
        return _read_parquet(uri, columns)
    if ending in DELIMITERS:
        return _read_text(uri, columns, DELIMITERS[ending])
    raise InputError(f"{uri} is neither .csv, .tsv nor .parquet; expected {EXPECTED}")


def _read_text(uri: str, columns: list[str], delimiter: str) -> Iterator[tuple]:
    text = "\n".join(_annotations.lines(uri))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        places = _places(uri, columns, next(reader, []))
        for row in reader:
            if row:
                yield tuple(row[p] if p is not None and p < len(row) else None for p in places)
    except csv.Error as error:
        raise InputError(f"{uri} line {reader.line_num}: {error}; mend the quotes there") from None


def _read_parquet(uri: str, columns: list[str]) -> Iterator[tuple]:
    try:
        file = pq.ParquetFile(pa.BufferReader(_store.read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a Parquet file ({error})") from None
    places = _places(uri, columns, file.schema_arrow.names)
    wanted = [c for c, place in zip(columns, places, strict=True) if place is not None]
    for batch in file.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            yield tuple(row.get(column) for column in columns)


def _places(uri: str, columns: list[str], header: list[str]) -> list[int | None]:
    """Where the columns are in the header; the split column may be absent."""
    for column, setting in zip(columns[:2], ("image_column", "caption_column"), strict=True):
        if column not in header:
            raise InputError(
                f"{uri} has no column {column!r} (source.{setting}){did_you_mean(column, header)}"
            )
    return [header.index(column) if column in header else None for column in columns]


def _image_uri(folder: str, path: str) -> str:
    return path if path.startswith("/") or "://" in path else _store.join(folder, path)


def _image_id(path: str) -> str:
    """The path as written, without the ending of an image type."""
    return path[: len(path) - len(_store.name_of(path)) + len(_annotations.stem(path))]
