"""Parquet tables, read a batch of rows at a time, and the images in their cells.

The bytes of an image are not read with its row but when they are asked for by `FILE#COLUMN/ROW`.
Parquet knows no finer place than a row group, so the last groups read are remembered.
"""

import bisect
import contextlib
import functools
import itertools
import json
import re
import threading
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.sources.readers import cells
from pipeline.storage import store

CELL = re.compile(r"(?P<table>.+\.parquet)#(?P<column>.+)/(?P<row>\d+)", re.DOTALL | re.IGNORECASE)
GROUP_BYTES = 1 << 30  # of a row group's images, all of which are read for one of them
BATCH_ROWS = 4096


def cell_uri(uri: str, column: str, row: int) -> str:
    return f"{uri}#{column}/{row}"


def table_of(uri: str) -> str | None:
    """The table that a cell's URI names; None where the URI is of another form."""
    cell = CELL.fullmatch(uri)
    return cell["table"] if cell else None


def column_names(uri: str) -> list[str]:
    with _opened(uri) as file:
        return file.schema_arrow.names


def holds_bytes(uri: str, column: str) -> bool:
    """Whether the cells of a column are the images themselves, in row groups of a sensible size."""
    with _opened(uri) as file:
        if not _is_bytes(file.schema_arrow.field(column).type, column, uri):
            return False
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = map(group.column, range(group.num_columns))
            own = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
            if (size := sum(chunk.total_uncompressed_size for chunk in own)) > GROUP_BYTES:
                raise InputError(
                    f"{uri} has {size >> 20} MiB of images in row group {number}, and an image is "
                    "read with its whole group; write the table with row_group_size=100"
                )
    return True


def _is_bytes(type_: pa.DataType, column: str, uri: str) -> bool:
    """Whether values of a type are images: bytes, a record of them, a list of one of these."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return _is_bytes(type_.value_type, column, uri)
    if pa.types.is_struct(type_):
        if type_.get_field_index("bytes") < 0:
            raise InputError(f"{uri} column {column!r} holds {type_}, in which there is no 'bytes'")
        return True
    if (
        pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_binary_view(type_)
    ):
        return True
    if not (
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
    ):
        raise InputError(f"{uri} column {column!r} holds {type_}; expected images' paths or bytes")
    return False


def labels(uri: str) -> dict[str, list[str]]:
    """What the numbers of columns of class labels are called, where the file says it."""
    with _opened(uri) as file:
        about = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(about).get("info", {}).get("features", {})
        return {c: f["names"] for c, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, AttributeError):
        return {}


def rows(
    uri: str, columns: list[str | None], labels: dict[str, list[str]] | None = None
) -> Iterator[tuple]:
    """The values of the columns in each row, None for a column that is None."""
    names = [name for name in columns if name]
    named = {column: found for column, found in (labels or {}).items() if column in names}
    with _opened(uri) as file:
        for batch in file.iter_batches(columns=names, batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                for column, words in named.items():
                    if isinstance(row[column], int) and 0 <= row[column] < len(words):
                        row[column] = words[row[column]]
                yield tuple(row.get(name) for name in columns)


_LOCK = threading.Lock()


def cell_bytes(uri: str) -> bytes | None:
    """The image a cell's URI names; None where the URI is of another form."""
    if not (cell := CELL.fullmatch(uri)):
        return None
    if not store.exists(cell["table"]):
        raise FileNotFoundError(cell["table"])
    row = int(cell["row"])
    with _LOCK:  # threads that want the same row group would each read it
        starts = _starts(cell["table"])
        if row >= starts[-1]:
            raise InputError(f"{cell['table']} has {starts[-1]} rows; there is no row {row}")
        group = bisect.bisect_right(starts, row) - 1
        value = _column(cell["table"], cell["column"], group)[row - starts[group]].as_py()
    found = cells.picture(value)
    if not isinstance(found, bytes):
        path = f" (only a path, {found})" if found else ""
        raise InputError(f"no bytes in the table{path}: {uri}")
    return found


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """The table; what is wrong with it is told whenever it shows."""
    try:
        file = pq.ParquetFile(store.opened(uri))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{uri} is not a Parquet file ({error})") from None
    try:
        with file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{uri} is damaged ({error}); write or copy it again") from None


@functools.lru_cache(maxsize=64)
def _starts(uri: str) -> list[int]:
    """The first row of each row group, and the number of rows."""
    with _opened(uri) as file:
        groups = [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]
    return list(itertools.accumulate(groups, initial=0))


@functools.lru_cache(maxsize=4)
def _column(uri: str, column: str, group: int) -> pa.ChunkedArray:
    with _opened(uri) as file:
        return file.read_row_group(group, columns=[column]).column(0)
