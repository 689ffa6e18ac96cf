"""Files at any URI: absolute names, whole-or-nothing writes, fingerprints."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.storage import parquet, store

TABLE = pa.table({"id": ["a", "b", "c"], "value": [1.5, 2.5, None]})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


# ---- names -------------------------------------------------------------------------------------


def test_a_local_path_becomes_absolute_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store.absolute("runs/x") == str(tmp_path / "runs/x")
    assert store.absolute("/runs/x") == "/runs/x"
    assert store.absolute("file:///runs/x") == "/runs/x"


def test_a_home_folder_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.absolute("~/runs") == str(tmp_path / "runs")


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "memory://runs", "gs://bucket/a b/ü"])
def test_a_uri_stays_as_it_is(uri):
    assert store.absolute(uri) == uri
    assert not store.is_local(uri)


def test_a_file_uri_is_a_local_path(tmp_path):
    uri = f"file://{tmp_path}/new/file"
    assert store.is_local(uri)
    store.write_bytes(uri, b"1")
    assert (tmp_path / "new" / "file").read_bytes() == b"1"


@pytest.mark.parametrize("uri", ["s4://bucket/runs", "s4://"])
def test_a_scheme_that_nobody_knows_is_bad_input(uri):
    with pytest.raises(InputError, match="s4://.* cannot be reached: Protocol not known: s4"):
        store.list_files(uri)


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="abc./ü -", min_size=1, max_size=20))
def test_an_absolute_name_is_its_own_absolute_name(path):
    once = store.absolute(path)
    assert Path(once).is_absolute()
    assert store.absolute(once) == once


def test_names_are_joined_and_taken_apart_again():
    assert store.join("s3://bucket/run/", "2-shards", "a.tar") == "s3://bucket/run/2-shards/a.tar"
    assert store.name_of("s3://bucket/run/2-shards/a.tar") == "a.tar"
    assert store.name_of("/run/2-shards/") == "2-shards"


# ---- bytes -------------------------------------------------------------------------------------


def test_bytes_come_back_whole_and_by_range(folder):
    uri = store.join(folder, "deep", "er", "file.bin")
    store.write_bytes(uri, bytes(range(100)))
    assert store.exists(uri)
    assert store.read_bytes(uri) == bytes(range(100))
    assert store.read_bytes(uri, 10, 5) == bytes(range(10, 15))
    assert store.read_bytes(uri, 90) == bytes(range(90, 100))


def test_ranges_end_where_the_file_ends(folder):
    uri = store.join(folder, "file.bin")
    store.write_bytes(uri, bytes(range(100)))
    for offset, size in [(0, 0), (10, 0), (0, 1000), (90, 1000), (99, 1), (0, 100), (99, None)]:
        stop = None if size is None else offset + size
        assert store.read_bytes(uri, offset, size) == bytes(range(100))[offset:stop]


def test_an_empty_file_is_a_file(folder):
    uri = store.join(folder, "empty")
    store.write_bytes(uri, b"")
    assert store.exists(uri) and store.list_files(folder) == {"empty": 0}
    assert store.read_bytes(uri) == b"" and store.stamp(uri)[0] == 0


@pytest.mark.parametrize("name", ["a::b", "what?", "50% off {x}", "data [v2]", "a#1", "ü", "a b"])
def test_names_may_hold_what_other_programs_take_for_signs(folder, name):
    uri = store.join(folder, name, "x::y.json")
    store.write_json(uri, {"n": 1})
    assert store.read_json(uri) == {"n": 1} and store.exists(uri)
    assert list(store.list_files(store.join(folder, name))) == ["x::y.json"]
    assert name in store.list_folders(folder)
    store.remove(store.join(folder, name))
    assert not store.exists(uri)


def test_a_file_that_is_not_there_is_the_same_error_everywhere(folder):
    for read in (store.read_bytes, parquet.read_table, store.stamp):
        with pytest.raises(FileNotFoundError):
            read(store.join(folder, "nowhere"))
    with pytest.raises(FileNotFoundError):
        store.read_bytes(store.join(folder, "nowhere"), 5, 5)


def test_json_comes_back_and_the_same_value_is_the_same_bytes(folder):
    store.write_json(store.join(folder, "a.json"), {"b": [1, None], "a": "ü"})
    store.write_json(store.join(folder, "b.json"), {"a": "ü", "b": [1, None]})
    assert store.read_json(store.join(folder, "a.json")) == {"a": "ü", "b": [1, None]}
    a, b = (store.read_bytes(store.join(folder, name)) for name in ("a.json", "b.json"))
    assert a == b


def test_a_listing_has_files_with_sizes_and_folders_and_nothing_deeper(folder):
    store.write_bytes(store.join(folder, "a"), b"1")
    store.write_bytes(store.join(folder, "b"), b"22")
    store.write_bytes(store.join(folder, "inside", "c"), b"333")
    assert store.list_files(folder) == {"a": 1, "b": 2}
    assert store.list_folders(folder) == ["inside"]


def test_a_folder_that_is_not_there_is_empty_and_removing_it_does_nothing(folder):
    nowhere = store.join(folder, "nowhere")
    assert store.list_files(nowhere) == {} and store.list_folders(nowhere) == []
    store.remove(nowhere)
    assert not store.exists(nowhere)


def test_removing_a_folder_removes_all_it_holds(folder):
    store.write_bytes(store.join(folder, "gone", "deep", "a"), b"1")
    store.write_bytes(store.join(folder, "kept"), b"1")
    store.remove(store.join(folder, "gone"))
    assert store.list_folders(folder) == [] and store.list_files(folder) == {"kept": 1}


def test_what_another_process_writes_and_removes_is_seen_at_once(bucket, tmp_path):
    """Against a listing that was remembered: this client shares no memory with fsspec's."""
    import boto3

    client, name = boto3.client("s3"), store.name_of(bucket)
    folder = f"{bucket}/{tmp_path.name}"
    store.write_bytes(f"{folder}/ours", b"1")
    assert store.list_files(folder) == {"ours": 1}
    client.put_object(Bucket=name, Key=f"{tmp_path.name}/theirs", Body=b"22")
    assert store.list_files(folder) == {"ours": 1, "theirs": 2}
    assert store.exists(f"{folder}/theirs")
    before = store.stamp(f"{folder}/theirs")
    client.put_object(Bucket=name, Key=f"{tmp_path.name}/theirs", Body=b"33")
    assert store.stamp(f"{folder}/theirs") != before
    client.delete_object(Bucket=name, Key=f"{tmp_path.name}/theirs")
    assert not store.exists(f"{folder}/theirs") and store.list_files(folder) == {"ours": 1}


def test_a_folder_that_someone_else_marked_with_an_empty_object_is_no_file(bucket, tmp_path):
    import boto3

    boto3.client("s3").put_object(Bucket=store.name_of(bucket), Key=f"{tmp_path.name}/", Body=b"")
    assert store.list_files(f"{bucket}/{tmp_path.name}") == {}


def test_many_threads_write_and_read_ranges_at_once(folder):
    def there_and_back(number: int) -> bool:
        uri, data = store.join(folder, f"{number % 8}.bin"), bytes([number % 8]) * 1000
        store.write_bytes(uri, data)
        return store.read_bytes(uri, 100, 50) == data[100:150]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(64)))
    assert store.list_files(folder) == {f"{n}.bin": 1000 for n in range(8)}


def test_a_changed_file_has_another_stamp(folder):
    uri = store.join(folder, "file")
    store.write_bytes(uri, b"1")
    before = store.stamp(uri)
    assert store.stamp(uri) == before
    store.write_bytes(uri, b"22")
    assert store.stamp(uri) != before


# ---- whole or nothing --------------------------------------------------------------------------


def test_a_file_that_fails_half_way_is_not_there_at_all(tmp_path):
    uri = str(tmp_path / "new" / "file")
    with pytest.raises(RuntimeError), store.temporary(uri) as path:
        Path(path).write_bytes(b"half")
        raise RuntimeError
    assert not store.exists(uri)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_fails_half_way_leaves_the_old_one_as_it_was(tmp_path):
    uri = str(tmp_path / "file")
    store.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError), store.temporary(uri) as path:
        Path(path).write_bytes(b"half")
        assert store.read_bytes(uri) == b"old"
        raise RuntimeError
    assert store.read_bytes(uri) == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_file_that_fails_half_way_reaches_no_store(folder):
    uri = store.join(folder, "file")
    with pytest.raises(RuntimeError), store.temporary(uri) as path:
        raise RuntimeError
    assert not store.exists(uri) and not Path(path).exists()


def test_a_finished_file_takes_its_place_and_its_temporary_name_is_gone(folder):
    uri = store.join(folder, "file")
    with store.temporary(uri) as path:
        Path(path).write_bytes(b"whole")
        assert not store.exists(uri)
    assert store.read_bytes(uri) == b"whole"
    assert store.list_files(folder) == {"file": 5}
    assert not Path(path).exists()


WRITE_FOR_EVER = """
import sys, time
from pipeline.storage import store
with store.temporary(sys.argv[1]) as path:
    print(path, flush=True)
    time.sleep(60)
"""


def writing(uri: str) -> tuple[subprocess.Popen, Path]:
    """A process in the middle of writing a file, and the temporary file's path."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, uri], stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_was_writing_is_swept_away_and_nothing_else(folder):
    (alive, kept), (dead, left) = (writing(store.join(folder, n)) for n in ("alive", "dead"))
    dead.kill()
    dead.wait()
    assert kept.exists() and left.exists()
    store.sweep(str(left.parent))
    assert kept.exists() and not left.exists()
    alive.kill()
    alive.wait()
    process, new = writing(store.join(folder, "next"))  # a process sweeps before it first writes
    assert new.exists() and not kept.exists()
    process.kill()
    process.wait()
    store.sweep(str(new.parent))
    assert not new.exists()


def test_writers_and_sweepers_do_not_disturb_each_other(tmp_path):
    def write(number: int) -> None:
        store.write_bytes(str(tmp_path / f"{number}"), b"1" * number)
        store.sweep(str(tmp_path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(300)))
    assert store.list_files(str(tmp_path)) == {f"{n}": n for n in range(300)}


def test_a_listing_bears_with_files_that_vanish(tmp_path):
    store.write_bytes(str(tmp_path / "stays"), b"1")

    def come_and_go(_) -> None:
        with pytest.raises(RuntimeError), store.temporary(str(tmp_path / "never")):
            raise RuntimeError

    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(lambda: [come_and_go(n) for n in range(300)])
        while not busy.done():
            assert store.list_files(str(tmp_path))["stays"] == 1
    busy.result()


def test_a_link_to_a_file_is_a_file_and_one_to_nothing_is_none(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/file").write_bytes(b"four")
    (tmp_path / "link").symlink_to(tmp_path / "inside/file")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").symlink_to(tmp_path / "inside")
    assert store.list_files(str(tmp_path)) == {"link": 4}


def test_other_users_of_a_shared_folder_may_read_what_was_written(tmp_path):
    store.write_bytes(str(tmp_path / "file"), b"1")
    assert (tmp_path / "file").stat().st_mode & 0o444 == 0o444


# ---- fingerprints ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(JSON)
def test_a_fingerprint_is_16_digits_and_outlives_a_trip_through_json(value):
    digits = store.fingerprint(value)
    assert len(digits) == 16 and int(digits, 16) >= 0
    assert store.fingerprint(json.loads(json.dumps(value))) == digits


@settings(max_examples=30, deadline=None)
@given(JSON, JSON)
def test_different_parts_have_different_fingerprints(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (store.fingerprint(a) == store.fingerprint(b)) == same


def test_a_fingerprint_sees_where_parts_begin_and_not_the_order_of_keys():
    assert store.fingerprint("ab", "c") != store.fingerprint("a", "bc")
    assert store.fingerprint(["a"], []) != store.fingerprint([], ["a"])
    assert store.fingerprint({"a": 1, "b": 2}) == store.fingerprint({"b": 2, "a": 1})
