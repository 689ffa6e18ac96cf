"""Copies of remote files on this machine: fetched once, checked, dropped, by many at once."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.storage import cache as shard_cache
from pipeline.storage import store

MANY = 10**9  # bytes: room for all


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A new folder for the copies, and a process that knows none of them."""
    monkeypatch.setenv("HALFTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "_whole", set())
    monkeypatch.setattr(shard_cache, "_no_room", set())
    return tmp_path / "cache"


def remote(name: str, data: bytes) -> tuple[str, dict]:
    """A file in a store that is not this machine's, with its entry in the index."""
    uri = f"memory://{name}"
    store.write_bytes(uri, data)
    return uri, {"bytes": len(data), "sha256": store.sha256(data)}


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The files that were fetched."""
    names, fetch = [], shard_cache._fetch

    def counted(uri: str, *rest) -> None:
        names.append(store.name_of(uri))
        fetch(uri, *rest)

    monkeypatch.setattr(shard_cache, "_fetch", counted)
    return names


def copies(cache: Path) -> set[bytes]:
    return {path.read_bytes() for path in cache.iterdir()}


def test_a_file_is_fetched_once_and_read_in_parts(cache, fetched):
    uri, file = remote("a", b"0123456789")
    assert shard_cache.read(uri, file, MANY, 2, 3) == b"234"
    store.remove(uri)
    assert shard_cache.read(uri, file, MANY, 7, 9) == b"789"
    assert fetched == ["a"] and copies(cache) == {b"0123456789"}


def test_a_file_of_this_machine_is_read_where_it_is(cache, tmp_path):
    (tmp_path / "a").write_bytes(b"0123")
    assert shard_cache.kept(str(tmp_path / "a"), {"bytes": 4, "sha256": ""}, MANY) == str(
        tmp_path / "a"
    )
    assert not cache.exists()


def test_the_least_recently_used_is_dropped(cache, fetched):
    (a, of_a), (b, of_b), (c, of_c) = (remote(n, n.encode() * 10) for n in "abc")
    for uri, file in ((a, of_a), (b, of_b), (a, of_a), (c, of_c)):
        shard_cache.read(uri, file, 25, 0, 10)
    assert copies(cache) == {b"a" * 10, b"c" * 10}
    assert shard_cache.read(b, of_b, 25, 0, 2) == b"bb"
    assert fetched == ["a", "b", "c", "b"] and copies(cache) == {b"b" * 10, b"c" * 10}


def test_a_file_larger_than_the_limit_is_not_kept(cache, fetched):
    uri, file = remote("a", b"0123456789")
    assert shard_cache.read(uri, file, 9, 2, 3) == b"234"
    assert fetched == [] and not cache.exists()


@pytest.mark.parametrize("torn", [b"", b"01234", b"0123456780"])
def test_a_torn_copy_is_fetched_anew(cache, torn):
    uri, file = remote("a", b"0123456789")
    cache.mkdir()
    (cache / file["sha256"]).write_bytes(torn)
    assert shard_cache.read(uri, file, MANY, 0, 10) == b"0123456789"
    assert copies(cache) == {b"0123456789"}


def test_a_file_that_is_not_what_its_index_says_is_refused(cache):
    uri, file = remote("a", b"0123456789")
    store.write_bytes(uri, b"0123456780")
    with pytest.raises(InputError, match="memory://a has other bytes than when it was written"):
        shard_cache.read(uri, file, MANY, 0, 10)
    assert copies(cache) == set()


def test_a_full_disk_costs_the_copy_and_not_the_work(cache, monkeypatch, fetched):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_cache, "_has", full)
    uri, file = remote("a", b"0123456789")
    assert [shard_cache.read(uri, file, MANY, at, 1) for at in (1, 2)] == [b"1", b"2"]
    assert fetched == ["a"]


def test_a_copy_dropped_by_another_process_is_read_from_its_store(cache, monkeypatch):
    uri, file = remote("a", b"0123456789")
    monkeypatch.setattr(shard_cache, "kept", lambda *_: str(cache / "gone"))
    assert shard_cache.read(uri, file, MANY, 2, 3) == b"234"


def test_a_file_that_is_nowhere_is_missing(cache):
    with pytest.raises(FileNotFoundError):
        shard_cache.read("memory://nowhere/a", {"bytes": 3, "sha256": "0" * 64}, MANY, 0, 3)


READER = """
import sys
from pipeline.storage import cache, store
fetch = cache._fetch
for turn in range(3):
    for name in sys.argv[1:]:
        data = name[-1].encode() * 100_000
        file = {"bytes": len(data), "sha256": store.sha256(data)}
        assert cache.read(name, file, 250_000, 50_000, 60_000) == data[50_000:]
"""


def test_two_processes_share_the_copies_and_keep_to_the_limit(cache, bucket):
    uris = [f"{bucket}/cache/{name}" for name in "abcd"]
    for uri in uris:
        store.write_bytes(uri, uri[-1].encode() * 100_000)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, *order], stderr=subprocess.PIPE)
        for order in (uris, uris[::-1])
    ]
    for reader in readers:
        assert reader.wait(600) == 0, reader.stderr.read().decode()[-2000:]
    held = [path.stat().st_size for path in cache.iterdir()]
    assert held == [100_000] * 2
