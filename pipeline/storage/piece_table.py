"""What an index says of its pieces, a column at a time.

Of a few pieces it stands in `index.json` itself, a line each, for people to read; of more it is a
Parquet file beside it, of which only the columns that are asked for are read.
"""

import functools
import io
import json
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError
from pipeline.storage import store

if TYPE_CHECKING:  # commands that only look at a folder do without it, until there is a table
    import pyarrow as pa
    import pyarrow.parquet as pq

ABOVE = 1_000  # pieces from which on they are a table
PREFIX = "index-"  # how the names of tables begin; then the hash of their bytes
ENDING = ".pieces"  # and end: what ends in .parquet is a piece
JSON = b"halftone.json"  # columns whose values are JSON, in the table's metadata
BATCH = 4_096  # pieces that are Python's objects at a time
RECENT = 1_000  # entries that are kept as Python's objects
as_json = json.JSONEncoder(sort_keys=True).encode


class PieceTable(Sequence[dict]):
    """The entries of pieces, in order, of which those columns are in memory that were asked for.

    `versions` are the hashes of what the pieces of a split hold, and of all (""), where known.
    """

    def __init__(self, stored: "_Stored", versions: dict[str, str], rows: np.ndarray | None = None):
        self._stored, self.versions, self._rows = stored, versions, rows

    @property
    def version(self) -> str:
        """Hash of what all of them hold; "" where it is not known."""
        return self.versions.get("", "")

    def __len__(self) -> int:
        return self._stored.count if self._rows is None else len(self._rows)

    def __getitem__(self, place):
        places = range(len(self))[place]
        if isinstance(place, slice):
            return list(self._dicts(np.array(places, np.int64)))
        return self._stored.entry(places if self._rows is None else int(self._rows[places]))

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), BATCH):
            yield from self._dicts(np.arange(start, min(start + BATCH, len(self))))

    def values(self, name: str) -> "pa.ChunkedArray | None":
        """A column as Arrow has it, nested values as JSON; None where no piece has it."""
        column = self._stored.column(name)
        if column is None or self._rows is None:
            return column
        return column.take(self._rows)

    def of_split(self, split: str) -> "PieceTable":
        """The pieces of one split."""
        column = self.values("split")
        met = np.empty(0, np.int64)
        if column is not None:
            import pyarrow.compute as pc

            met = np.flatnonzero(pc.fill_null(pc.equal(column, split), False).to_numpy())
        return self.at(met, {"": self.versions.get(split, "")})

    def at(self, places: np.ndarray, versions: dict[str, str] | None = None) -> "PieceTable":
        """The pieces at some places, in that order."""
        if np.array_equal(places, np.arange(len(self))):
            return self
        rows = places if self._rows is None else self._rows[places]
        return PieceTable(self._stored, versions or {}, rows)

    def _dicts(self, places: np.ndarray) -> Iterator[dict]:
        rows = places if self._rows is None else self._rows[places]
        yield from self._stored.entries(rows)


def _read(value: Any, is_json: bool) -> Any:
    """A value as it was before `_written`."""
    if is_json:
        return json.loads(value)
    if isinstance(value, list):
        return {f["name"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in value}
    return value


class _Stored:
    """A table in storage: its columns are read when they are asked for, and kept."""

    def __init__(self, uri: str, size: int, count: int):
        self.uri, self.size, self.count = uri, size, count
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._recent: dict[int, dict] = {}  # the least recently asked for first
        self._reading = threading.Lock()

    def __reduce__(self):
        return _stored, (self.uri, self.size, self.count)

    @functools.cached_property
    def _file(self) -> "pq.ParquetFile":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if store.is_local(self.uri):
                return pq.ParquetFile(self.uri.removeprefix("file://"))
            return pq.ParquetFile(pa.PythonFile(_Ranges(self.uri, self.size)), pre_buffer=True)
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{self.uri}, which its folder's index names, is missing or torn ({error}); run "
                "the stage's command again"
            ) from error

    @functools.cached_property
    def names(self) -> list[str]:
        return self._file.schema_arrow.names

    @functools.cached_property
    def nested(self) -> set[str]:
        return set(json.loads((self._file.schema_arrow.metadata or {})[JSON]))

    def column(self, name: str) -> "pa.ChunkedArray | None":
        if name in self.names:
            self._read([name])
        return self._columns.get(name)

    @functools.cached_property
    def _whole(self) -> "pa.Table":
        self._read(self.names)
        import pyarrow as pa

        return pa.table({name: self._columns[name] for name in self.names})

    def _read(self, names: list[str]) -> None:
        with self._reading:
            if missing := [name for name in names if name not in self._columns]:
                found = self._file.read(missing)
                self._columns |= {name: found[name] for name in missing}

    def entries(self, rows: np.ndarray) -> Iterator[dict]:
        """Whole entries, as they were given."""
        if len(rows) and (np.diff(rows) == 1).all():
            found = self._whole.slice(int(rows[0]), len(rows))
        else:
            found = self._whole.take(rows)
        for row in found.to_pylist():
            there = ((name, value) for name, value in row.items() if value is not None)
            yield {name: _read(value, name in self.nested) for name, value in there}

    def entry(self, row: int) -> dict:
        """One entry; those that were asked for last are kept."""
        if (found := self._recent.pop(row, None)) is None:
            found = next(self.entries(np.array([row])))
            if len(self._recent) >= RECENT:
                self._recent.pop(next(iter(self._recent)), None)
        self._recent[row] = found
        return found


class _Ranges(io.RawIOBase):
    """A file of known size in any store: a request for each reading, none to open it."""

    def __init__(self, uri: str, size: int):
        self.uri, self.size, self.place = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence, self.size)
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.place)
        size = left if size is None or size < 0 else min(size, left)
        data = store.read_bytes(self.uri, self.place, size)
        self.place += len(data)
        return data


# ---- what is asked of entries, whether they are a table or a list -----------------------------


def column(entries: Sequence[dict], name: str, default: Any = None) -> list:
    """A value of every entry, `default` where it has none."""
    if not isinstance(entries, PieceTable):
        return [entry.get(name, default) for entry in entries]
    if (found := entries.values(name)) is None:
        return [default] * len(entries)
    is_json = name in entries._stored.nested
    if is_json:  # most of them are the same few, such as {} of what was rejected
        found = found.dictionary_encode().combine_chunks()
        known = [json.loads(text) for text in found.dictionary.to_pylist()]
        places = found.indices.to_pylist()
        return [default if place is None else known[place] for place in places]
    values = found.to_pylist()
    if name == "files":
        return [default if value is None else _read(value, False) for value in values]
    return [default if value is None else value for value in values] if found.null_count else values


def where(entries: Sequence[dict], name: str) -> Sequence[dict]:
    """The pieces that have more than nothing of something, such as samples."""
    return at(entries, np.flatnonzero(column(entries, name, 0)))


def at(entries: Sequence[dict], places: Sequence[int] | np.ndarray) -> Sequence[dict]:
    """The entries at some places, in that order."""
    if isinstance(entries, PieceTable):
        return entries.at(np.asarray(places, np.int64))
    return [entries[place] for place in places]


def split_names(entries: Sequence[dict]) -> list[str]:
    """The splits that pieces are of, in order."""
    if isinstance(entries, PieceTable):
        found = entries.values("split")
        return [] if found is None else found.drop_null().unique().to_pylist()
    return list(dict.fromkeys(entry["split"] for entry in entries if "split" in entry))


def sizes(entries: Sequence[dict]) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file of the pieces."""
    if not isinstance(entries, PieceTable):
        for entry in entries:
            yield from ((name, file["bytes"]) for name, file in entry["files"].items())
    elif (found := entries.values("files")) is not None:
        for chunk in found.chunks:
            files = chunk.flatten()
            yield from zip(
                files.field("name").to_pylist(), files.field("bytes").to_pylist(), strict=True
            )


# ---- in a folder -------------------------------------------------------------------------------


def write(folder: str, entries: list[dict], versions: dict[str, str]) -> dict:
    """Write the table of some pieces; what the index says of it.

    `versions` are the hashes of what the pieces of each split hold, and of all ("").
    """
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = _written(entries)
    plain = [name for name in table.schema.names if name not in ("files", "name", "fingerprint")]
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=plain, row_group_size=len(entries)
    )
    data = sink.getvalue()
    digest = store.sha256(data)
    name = f"{PREFIX}{digest[:16]}{ENDING}"
    store.write_bytes(store.join(folder, name), data)
    about = {"name": name, "bytes": len(data), "sha256": digest}
    return {**about, "pieces": len(entries), "versions": versions}


def is_table(name: str) -> bool:
    """Whether a file's name is that of a table."""
    return name.startswith(PREFIX) and name.endswith(ENDING)


def _written(entries: list[dict]) -> "pa.Table":
    import pyarrow as pa

    kinds_of = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    file = pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
    names = dict.fromkeys(name for entry in entries for name in entry)
    columns, as_text = {}, []
    for name in names:
        values = [entry.get(name) for entry in entries]
        there = [name in entry for entry in entries]
        kinds = {type(value) for value, is_ in zip(values, there, strict=True) if is_}
        if name == "files":
            files = [[{"name": n, **one} for n, one in (value or {}).items()] for value in values]
            columns[name] = pa.array(files, pa.list_(file))
        elif len(kinds) == 1 and (kind := kinds_of.get(*kinds)) is not None:
            columns[name] = pa.array(values, kind)
        else:
            as_text.append(name)
            texts = [as_json(v) if is_ else None for v, is_ in zip(values, there, strict=True)]
            columns[name] = pa.array(texts, pa.string())
    return pa.table(columns).replace_schema_metadata({JSON: as_json(as_text)})


@functools.lru_cache(maxsize=8)
def _stored(uri: str, size: int, count: int) -> _Stored:
    return _Stored(uri, size, count)  # named by its bytes: it stays as it is


def opened(folder: str, about: dict) -> PieceTable:
    """The table that an index tells of; nothing of it is read yet."""
    uri = store.join(folder, about["name"])
    found = _stored(uri, about["bytes"], about["pieces"])
    return PieceTable(found, about["versions"])
