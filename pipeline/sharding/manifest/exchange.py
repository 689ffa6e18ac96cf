"""Rows that tasks sort into buckets: runs on storage, of which a bucket's task reads its own.

A file of runs holds Arrow streams one after the other: for every block of rows that was written the
rows of bucket 0, of bucket 1, and so on. Where each ends stands in a Parquet file beside it, which
is written last. So no task holds more than a block or a bucket, and none reads what it does not
need.
"""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.storage import parquet, store
from pipeline.storage.plan import Piece

OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
Block = tuple[pa.Table, np.ndarray]  # rows, and the bucket of each


class Stretch(NamedTuple):
    """Rows that lie in a file of runs."""

    uri: str
    start: int  # bytes
    end: int

    def read(self) -> pa.Table:
        data = store.read_bytes(self.uri, self.start, self.end - self.start)
        return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


def buckets_of(ids: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """The bucket of each id, the same wherever the id stands."""
    values = ids.cast(pa.large_binary()).to_pylist()
    return (np.fromiter(map(zlib.crc32, values), np.uint32, len(values)) % buckets).astype(np.int32)


def write(piece: Piece, buckets: int, blocks: Iterable[Block], summary: dict) -> dict:
    """Write the blocks' rows by bucket, in the order in which they come; the summary with files."""
    cut = (part for table, bucket_N in blocks for part in _cut(table, bucket_N, buckets))
    return write_parts(piece, cut, lambda ends: {"end": ends}, summary)


def write_parts(
    piece: Piece,
    parts: Iterable[pa.Table],
    columns: Callable[[pa.Array], dict[str, Any]],
    summary: dict,
) -> dict:
    """Write tables one after the other, and `columns(ends)` into the Parquet file beside them."""
    uri, ends, size, hashed = runs_of(piece.output), [], 0, hashlib.sha256()
    with store.temporary(uri) as path, open(path, "wb") as file:
        for part in parts:
            data = _bytes(part) if len(part) else b""
            file.write(data)
            hashed.update(data)
            size += len(data)
            ends.append(size)
    files = {store.name_of(uri): {"bytes": size, "sha256": hashed.hexdigest()}}
    table = pa.table(columns(pa.array(ends, pa.int64())))
    return parquet.write_table(piece.output, table, piece.fingerprint, {**summary, "files": files})


def write_array(piece: Piece, values: np.ndarray) -> tuple[str, dict]:
    """Write numbers as they lie in memory, in place of runs; the file's name, size and hash."""
    uri = runs_of(piece.output)
    with store.temporary(uri) as path:
        values.tofile(path)
    about = {"bytes": values.nbytes, "sha256": hashlib.sha256(values.data).hexdigest()}
    return store.name_of(uri), about


def _cut(table: pa.Table, bucket_N: np.ndarray, buckets: int) -> Iterator[pa.Table]:
    rows = table.take(np.argsort(bucket_N, kind="stable"))
    ends = np.bincount(bucket_N, minlength=buckets).cumsum().tolist()
    for start, end in itertools.pairwise([0, *ends]):
        yield rows.slice(start, end - start)


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=OPTIONS) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def runs_of(uri: str) -> str:
    """The file of runs beside a piece's Parquet file."""
    return uri.removesuffix(".parquet") + ".runs"


def bucket(uris: Sequence[str], number: int, buckets: int) -> Iterator[pa.Table]:
    """The rows of a bucket, run by run: of the pieces whose Parquet files these are, in order."""
    for uri in uris:
        ends = parquet.read_table(uri, ["end"])["end"].to_numpy()
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        own = slice(number, None, buckets)
        for start, end in zip(starts[own].tolist(), ends[own].tolist(), strict=True):
            if end > start:
                yield Stretch(runs_of(uri), start, end).read()


def joined(uris: Sequence[str], number: int, buckets: int, empty: pa.Schema) -> pa.Table:
    """All rows of a bucket in one table, with offsets of 64 bits."""
    return parquet.joined([empty.empty_table(), *bucket(uris, number, buckets)])
