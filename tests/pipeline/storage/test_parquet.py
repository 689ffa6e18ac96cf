"""Tables that know their fingerprint, in every kind of store."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import parquet, store
from pipeline.storage.vector_columns import vector_column, vector_matrix
from tests.helpers.paths import ROOT

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


def vectors_of(rows: int, kind=np.float16) -> pa.Table:
    values = np.random.default_rng(0).normal(size=(rows, 32)).astype(kind)
    return pa.table({"id": [f"i{n}" for n in range(rows)], "vector": vector_column(values)})


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_vectors_are_written_as_they_are_and_the_same_twice(folder, kind):
    table = vectors_of(500, kind)
    written = [parquet.write_table(f"{folder}/{n}.parquet", table, "f", {}) for n in "ab"]
    files = [summary["files"][f"{n}.parquet"] for summary, n in zip(written, "ab", strict=True)]
    assert files[0] == files[1]
    data = store.read_bytes(store.join(folder, "a.parquet"))
    columns = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    about = {columns.column(i).path_in_schema.split(".")[0]: columns.column(i) for i in (0, 1)}
    assert about["vector"].compression == "UNCOMPRESSED" and about["id"].compression == "ZSTD"
    dictionaries = {name: column.has_dictionary_page for name, column in about.items()}
    assert dictionaries == {"id": True, "vector": False}
    back = parquet.read_table(store.join(folder, "a.parquet"))
    assert back.replace_schema_metadata() == table


def test_vectors_written_with_a_dictionary_are_read_too(folder):
    table = vectors_of(50)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    store.write_bytes(store.join(folder, "old.parquet"), buffer.getvalue())
    uris = [store.join(folder, "old.parquet")]
    back = parquet.read_tables(uris)["vector"]
    assert np.array_equal(vector_matrix(back), vector_matrix(table["vector"]))


def test_several_tables_have_offsets_of_64_bits(folder):
    """Those of 32 end at 2 GiB, which one file never has and all together may."""
    caption = pa.struct([("caption_id", pa.string()), ("text", pa.string())])
    columns = {
        "id": pa.array(["a", "b"]),
        "captions": pa.array([[("x", "y")], [("z", "w")] * 2], pa.list_(caption)),
        "exact": pa.array([b"1", b"2"]),
    }
    uris = [store.join(folder, f"{n}.parquet") for n in range(2)]
    for uri in uris:
        parquet.write_table(uri, pa.table(columns), "f", {})
    for table in (parquet.read_tables(uris), parquet.joined([pa.table(columns)] * 2)):
        texts = pa.struct([("caption_id", pa.large_string()), ("text", pa.large_string())])
        kinds = [pa.large_string(), pa.large_list(texts), pa.large_binary()]
        assert table.schema.types == kinds and len(table) == 4


def test_tables_of_many_files_are_put_together_in_one_place():
    """Where they are cast to offsets of 64 bits; others put together what is of one file."""
    of_one_file = {"pipeline/labels/label.py", "pipeline/evaluation/ranking.py"}
    of_one_file |= {"pipeline/sharding/manifest/contents.py"}
    found = {
        str(path.relative_to(ROOT))
        for path in Path(ROOT, "pipeline").rglob("*.py")
        if "concat_tables(" in path.read_text()
    }
    assert found - of_one_file == {"pipeline/storage/parquet.py"}
