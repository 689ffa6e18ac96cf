"""Parquet tables, read a batch of rows at a time, and the images in their cells.

The bytes of an image are not read with its row but when they are asked for by `FILE#COLUMN/ROW`.
Parquet knows no finer place than a row group, so the last groups read are remembered.
"""

import bisect
import functools
import itertools
import re
import threading
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.sources.readers import annotations

CELL = re.compile(r"(?P<table>.+\.parquet)#(?P<column>.+)/(?P<row>\d+)", re.DOTALL | re.IGNORECASE)
GROUP_BYTES = 1 << 30  # of a row group's images, all of which are read for one of them
BATCH_ROWS = 4096


def cell_uri(uri: str, column: str, row: int) -> str:
    return f"{uri}#{column}/{row}"


def column_names(uri: str) -> list[str]:
    with _opened(uri) as file:
        return file.schema_arrow.names


def holds_bytes(uri: str, column: str) -> bool:
    """Whether the cells of a column are the images themselves, in row groups of a sensible size."""
    with _opened(uri) as file:
        type_ = file.schema_arrow.field(column).type
        if not (pa.types.is_struct(type_) or type_ in (pa.binary(), pa.large_binary())):
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


def rows(uri: str, columns: list[str | None]) -> Iterator[tuple]:
    """The values of the columns in each row, None for a column that is None."""
    names = [name for name in columns if name]
    with _opened(uri) as file:
        try:
            for batch in file.iter_batches(columns=names, batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    yield tuple(row.get(name) for name in columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{uri} is damaged ({error}); write or copy it again") from None


_LOCK = threading.Lock()


def cell_bytes(uri: str) -> bytes | None:
    """The image a cell's URI names; None where the URI is of another form."""
    if not (cell := CELL.fullmatch(uri)):
        return None
    row = int(cell["row"])
    with _LOCK:  # threads that want the same row group would each read it
        starts = _starts(cell["table"])
        if row >= starts[-1]:
            raise InputError(f"{cell['table']} has {starts[-1]} rows; there is no row {row}")
        group = bisect.bisect_right(starts, row) - 1
        value = _column(cell["table"], cell["column"], group)[row - starts[group]].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise InputError(f"no bytes in the table: {uri}")
    return data


def _opened(uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(annotations.opened(uri))
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a Parquet file ({error})") from None


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
