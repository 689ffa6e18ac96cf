"""Tables that know their fingerprint, in every kind of store."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import parquet, store

TABLE = pa.table({"id": ["a", "b", "c"], "value": [1.5, 2.5, None]})


def test_a_table_comes_back_and_so_does_its_summary(folder):
    uri = store.join(folder, "t.parquet")
    summary = parquet.write_table(uri, TABLE, "f1", {"rows": 3, "files": {"t.tar": {"bytes": 1}}})
    data = store.read_bytes(uri)
    own = {"bytes": len(data), "sha256": store.sha256(data)}
    assert summary == {"rows": 3, "files": {"t.tar": {"bytes": 1}, "t.parquet": own}}
    assert parquet.finished(uri, "f1") is None  # the file beside it is not there
    store.write_bytes(store.join(folder, "t.tar"), b"1")
    assert parquet.finished(uri, "f1") == summary
    assert parquet.read_table(uri).replace_schema_metadata() == TABLE
    assert parquet.read_table(uri, ["value"]).column_names == ["value"]


def test_a_table_carries_what_it_was_made_with(folder):
    uri = store.join(folder, "t.parquet")
    parquet.write_table(uri, TABLE, "f1", {}, encoder="tiny", dim=32)
    metadata = parquet.read_table(uri).schema.metadata
    assert metadata[b"halftone.encoder"] == b"tiny" and metadata[b"halftone.dim"] == b"32"


def test_a_table_of_another_fingerprint_or_no_table_is_not_finished(folder):
    uri = store.join(folder, "t.parquet")
    assert parquet.finished(uri, "f1") is None
    parquet.write_table(uri, TABLE, "f1", {})
    assert parquet.finished(uri, "f2") is None


def test_a_table_written_by_others_is_not_finished(folder):
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer)
    store.write_bytes(store.join(folder, "t.parquet"), buffer.getvalue())
    assert parquet.finished(store.join(folder, "t.parquet"), "f1") is None


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_torn_table_is_not_finished(folder, share):
    uri = store.join(folder, "t.parquet")
    parquet.write_table(uri, TABLE, "f1", {})
    data = store.read_bytes(uri)
    store.write_bytes(uri, data[: int(len(data) * share)])
    assert parquet.finished(uri, "f1") is None


def test_a_table_whose_footer_was_lost_on_the_disk_is_not_finished(folder):
    uri = store.join(folder, "t.parquet")
    parquet.write_table(uri, TABLE, "f1", {})
    data = store.read_bytes(uri)
    footer = int.from_bytes(data[-8:-4], "little")
    store.write_bytes(uri, data[: -8 - footer] + bytes(footer) + data[-8:])
    assert parquet.finished(uri, "f1") is None
