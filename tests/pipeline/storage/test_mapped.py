"""Tables mapped into memory: made once on a machine, whole, and given back."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.storage import cache as shard_cache
from pipeline.storage import mapped, parquet, store

MANY = 10**9  # bytes: room for all


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A new folder for what is made, and a process that knows none of it."""
    monkeypatch.setenv("HALFTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "_no_room", set())
    monkeypatch.setattr(mapped, "_open", {})
    return tmp_path / "cache"


def written(folder, name: str, rows: int = 100) -> tuple[str, dict]:
    """A Parquet file and its entry in the index."""
    uri = store.join(str(folder), f"{name}.parquet")
    table = pa.table({"n": np.arange(rows), "text": [f"{name} {n}" for n in range(rows)]})
    return uri, parquet.write_table(uri, table, "f", {})["files"][f"{name}.parquet"]


def table(uri: str, file: dict, limit: float = MANY) -> pa.Table:
    return mapped.table(uri, file, limit, "test-1", parquet.of_bytes)


def closed() -> None:
    mapped._open.clear()


def test_a_table_is_made_once_and_mapped(folder, cache):
    uri, file = written(folder, "a")
    expected = parquet.read_table(uri).to_pydict()
    before = pa.total_allocated_bytes()
    found = table(uri, file)
    assert found.to_pydict() == expected and found["text"].num_chunks == 1
    store.remove(uri)  # it lies here now
    closed()
    found = table(uri, file)
    assert found.to_pydict() == expected
    assert pa.total_allocated_bytes() <= before + 100_000
    assert [path.name for path in cache.iterdir()] == [f"{file['sha256']}.test-1"]


def test_a_table_stays_whole_when_it_is_dropped_from_the_cache(tmp_path, cache):
    uri, file = written(tmp_path, "a")
    found = table(uri, file)
    for path in cache.iterdir():
        path.unlink()
    assert found["text"].to_pylist() == [f"a {n}" for n in range(100)]
    closed()
    assert table(uri, file) == found  # made again


def test_no_more_is_held_open_than_is_allowed(tmp_path, monkeypatch):
    files = [written(tmp_path, name) for name in "abcd"]
    size = table(*files[0]).nbytes
    monkeypatch.setattr(mapped, "OPEN", 2.5 * size)
    for turn in (0, 1, 2, 0, 3, 2):
        assert table(*files[turn])["text"][7].as_py() == f"{'abcd'[turn]} 7"
        assert len(mapped._open) <= 2
    assert [key[0] for key in mapped._open] == [files[n][1]["sha256"] for n in (3, 2)]


def test_where_there_is_no_room_a_table_is_held_in_memory(tmp_path, cache, monkeypatch):
    uri, file = written(tmp_path, "a")
    expected = parquet.read_table(uri).to_pydict()
    assert table(uri, file, limit=10).to_pydict() == expected and not cache.exists()
    closed()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    assert table(uri, file).to_pydict() == expected
    assert not list(cache.iterdir())


@pytest.mark.parametrize("left", [0, 20, 1000])
def test_what_a_crash_tore_is_made_again(tmp_path, cache, left):
    uri, file = written(tmp_path, "a")
    expected = table(uri, file).to_pydict()
    closed()
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:left])
    assert table(uri, file).to_pydict() == expected


def test_a_file_that_is_not_what_its_index_says_is_refused(tmp_path):
    uri, file = written(tmp_path, "a")
    written(tmp_path, "a", rows=99)
    with pytest.raises(InputError, match="a.parquet has other bytes than its stage's index says"):
        table(uri, file)


def test_the_least_recently_used_is_dropped_with_the_copies_of_files(tmp_path, cache):
    files = [written(tmp_path, name) for name in "ab"]
    table(*files[0])
    (path,) = cache.iterdir()
    os.utime(path, (0, 0))
    table(*files[1], limit=1.5 * path.stat().st_size)
    assert [path.name for path in cache.iterdir()] == [f"{files[1][1]['sha256']}.test-1"]


READER = """
import sys
from pipeline.storage import mapped, parquet
uri, sha256, size = sys.argv[1:]
made = []
def make(data):
    made.append(1)
    return parquet.of_bytes(data)
found = mapped.table(uri, {"bytes": int(size), "sha256": sha256}, 1e9, "test-1", make)
print(len(made), found["n"].to_pylist() == list(range(100)))
"""


def test_processes_share_what_one_of_them_made(tmp_path, cache):
    uri, file = written(tmp_path, "a")
    command = [sys.executable, "-c", READER, uri, file["sha256"], str(file["bytes"])]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(reader.communicate(timeout=600)[0].split() for reader in readers)
    assert said == [["0", "True"], ["0", "True"], ["1", "True"]]
    assert len(list(cache.iterdir())) == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(0, 99))
def test_rows_are_found_in_their_shards(counts, seed):
    rows = mapped.Rows(counts)
    assert len(rows) == sum(counts)
    if not sum(counts):
        return
    of = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    asked = np.random.default_rng(seed).integers(0, sum(counts), 12)
    found = {}
    for shard, places, of_shard in rows.by_shard(asked):
        found |= {place: (shard, row) for place, row in zip(places, of_shard, strict=True)}
    assert [found[place] for place in range(12)] == [of[row] for row in asked]
    for wrong in (-1, sum(counts)):
        with pytest.raises(IndexError, match=f"of {sum(counts)}"):
            rows.shard_of(np.array([0, wrong]))
