"""Tables of shards that lie in memory as they lie on the disk: one copy for all of a machine.

What a Parquet file holds is written once to this machine's cache as Arrow does it, and mapped from
there: a row costs the pages it lies in, which the kernel keeps once for all processes and gives
back when memory is short. So a worker holds nothing that grows with the collection.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage import cache, store

LIMIT = 20e9  # bytes of what is kept, unless it is said: the default of train.cache_gb
OPEN = 256 * 2**20  # bytes of tables that a process holds open

_open: dict[tuple[str, str], pa.Table] = {}  # the least recently used first
_turn = threading.Lock()  # a service's threads ask at once


def table(
    uri: str, file: dict, limit: float, kind: str, make: Callable[[bytes], pa.Table]
) -> pa.Table:
    """What `make` makes of a file's bytes, mapped from this machine's cache, in one chunk.

    `file`, `limit` and `kind` are as of `cache.made`; where there is no room it is held in memory.
    """
    return kept_open(file, limit, kind, lambda: checked(uri, file, make))


def kept_open(file: dict, limit: float, kind: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table of `made`, held open for the next time."""
    key = file["sha256"], kind
    with _turn:
        if (found := _open.pop(key, None)) is not None:
            _open[key] = found
            return found
    found = made(file, limit, kind, make)
    with _turn:
        held = sum(other.nbytes for other in _open.values()) + found.nbytes
        while held > OPEN and _open:
            held -= _open.pop(next(iter(_open))).nbytes
        _open[key] = found
    return found


def made(file: dict, limit: float, kind: str, make: Callable[[], pa.Table]) -> pa.Table:
    """What `make` makes, once on this machine, mapped; held in memory where there is no room.

    `file`, `limit` and `kind` are as of `cache.made`. Several chunks become one.
    """
    tables: list[pa.Table] = []

    def written(path: str) -> None:
        tables.append(make().combine_chunks())
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, tables[0].schema) as writer:
            writer.write_table(tables[0])

    for anew in (False, True):
        path = cache.made(file, limit, kind, written, anew=anew)
        if path is None:
            break
        try:
            with pa.memory_map(path) as source:
                return pa.ipc.open_file(source).read_all()
        except FileNotFoundError:  # dropped by another process meanwhile
            break
        except (OSError, pa.ArrowInvalid):  # torn by a machine that went down
            continue
    return tables[0] if tables else make().combine_chunks()


def checked(uri: str, file: dict, make: Callable[[bytes], pa.Table]) -> pa.Table:
    """What `make` makes of a file's bytes; refused where they are not those of its index."""
    data = store.read_bytes(uri)
    if store.sha256(data) != file["sha256"]:
        raise InputError(
            f"{uri} has other bytes than its stage's index says; run the stage that writes it again"
        )
    return make(data)


class Rows:
    """Rows that are numbered through shards that follow one another: their starts alone."""

    def __init__(self, counts: Sequence[int] | np.ndarray):
        self.counts = np.asarray(counts, np.int64)
        self.ends = np.cumsum(self.counts)
        self.starts = self.ends - self.counts

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's shard; an IndexError where there is no such row."""
        if not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()}, of {len(self)}")
        return np.searchsorted(self.ends, rows, side="right")

    def by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places, rows within it) of every shard that rows (n,) are of.

        `places` are those in `rows`.
        """
        if not len(rows):
            return
        shard_of = self.shard_of(rows)
        order = np.argsort(shard_of, kind="stable")
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, firsts[1:]), strict=True):
            yield shard, places, rows[places] - self.starts[shard]
