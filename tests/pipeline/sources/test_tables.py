"""Tables of captions: .csv, .tsv and .parquet, with paths, addresses or the images' bytes."""

import concurrent.futures
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sources import source
from pipeline.sources.readers import parquet
from schemas.settings import SourceSettings
from tests.pipeline.sources.test_formats import captions, refused, rows_of

CSV = '''image,caption,split
a/1.jpg,"A dog, running",test
2.jpg,"He said ""hi""",train
a/1.jpg,A dog,test
'''


def test_csv_rows(tmp_path):
    (tmp_path / "table.csv").write_text(CSV)
    first, second = rows_of("csv", tmp_path / "table.csv")
    assert (first["image_id"], first["uri"], first["split"]) == (
        "a/1",
        f"{tmp_path}/a/1.jpg",
        "test",
    )
    assert captions(first) == [("a/1#0", "A dog, running"), ("a/1#1", "A dog")]
    assert captions(second) == [("2#0", 'He said "hi"')]
    assert second["split"] == "train"


def test_csv_with_other_columns_and_folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    path = tmp_path / "table.tsv"
    path.write_text("\ufefftext\tfile\nA dog, running\t1.jpg\n\n\t2.jpg\nhttp\tmemory://b/3.png\n")
    rows = rows_of("csv", path, images, image_column="file", caption_column="text")
    assert [row["uri"] for row in rows] == [
        f"{images}/1.jpg",
        f"{images}/2.jpg",
        "memory://b/3.png",
    ]
    assert captions(rows[1]) == [("2#0", "")], "the shard stage sets it aside"
    assert {row["split"] for row in rows} == {"train"}


def test_parquet_with_lists_of_captions_in_several_files(tmp_path):
    for name, split in (("b", "val"), ("a", "train")):
        table = {"image": [f"{name}.jpg"], "caption": [["one", "two"]], "split": [split]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    settings = SourceSettings(kind="csv", path=f"{tmp_path}/*.parquet")
    assert source("csv").parts(settings) == [f"{tmp_path}/{name}.parquet" for name in "ab"]
    first, second = rows_of("csv", f"{tmp_path}/*.parquet")
    assert captions(first) == [("a#0", "one"), ("a#1", "two")]
    assert (second["image_id"], second["split"]) == ("b", "val")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "image,words\n1.jpg,A dog\n",
            "it has 'image', 'words': name one by source.caption_column",
        ),
        ("", "table.csv is empty"),
        (
            "image,caption\n1.jpg,A red, white and blue flag\n",
            "line 2 has 3 cells, the header has 2",
        ),
        ("image,caption,caption\n1.jpg,A,B\n", "has two columns 'caption'"),
        ("image,caption,split\n1.jpg,A,train\n1.jpg,B,val\n", "row 2 puts '1.jpg' in split 'val'"),
        ('image,caption\n1.jpg,"A dog, a cat\n', "line 2 is not CSV"),
    ],
)
def test_csv_says_what_is_wrong_and_where(text, sentence, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    assert sentence in refused("csv", tmp_path / "table.csv")


def test_csv_refuses_files_it_cannot_read(tmp_path):
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    assert "is no table that can be read; expected a table (.csv" in refused(
        "csv", tmp_path / "table.xlsx"
    )
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    assert "is not a Parquet file" in refused("csv", tmp_path / "table.parquet")
    assert "no file matches source.path" in refused("csv", tmp_path / "*.csv")
    (tmp_path / "table.csv").write_bytes(b"image,caption\n1.jpg,caf\xe9\n")
    assert "line 2 is not UTF-8" in refused("csv", tmp_path / "table.csv")


def test_rows_without_a_split_are_of_the_one_the_table_is_named_after(tmp_path):
    for name in ("coco_val2017", "train-00000-of-00001", "dev_captions"):
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{name}.jpg,A dog\n")
    splits = {row["image_id"]: row["split"] for row in rows_of("csv", f"{tmp_path}/*.csv")}
    assert splits == {
        "coco_val2017": "val",
        "dev_captions": "val",
        "train-00000-of-00001": "train",
    }
    (tmp_path / "test_of_train.csv").write_text("image,caption\n1.jpg,A dog\n")
    said = refused("csv", f"{tmp_path}/*.csv")
    assert "test_of_train.csv says no split for 1 of its images" in said
    rows = rows_of("csv", f"{tmp_path}/test_of_train.csv", split="test")
    assert [row["split"] for row in rows] == ["test"]


def test_lists_of_captions_in_a_csv_may_be_json(tmp_path):
    lists = [json.dumps(["one, two", 'say "hi"']), "[sic] a dog", '["torn', '["a", 1, "b"]', "[]"]
    cells = ['"' + text.replace('"', '""') + '"' for text in lists]
    table = "image,caption\n" + "".join(f"{k}.jpg,{cell}\n" for k, cell in enumerate(cells))
    (tmp_path / "table.csv").write_text(table)
    found = [[text for _, text in captions(row)] for row in rows_of("csv", tmp_path / "table.csv")]
    assert found == [["one, two", 'say "hi"'], ["[sic] a dog"], [""], ["a", "", "b"], []]


def test_images_that_differ_in_their_ending_alone_are_two(tmp_path):
    names = ["a.jpg", "a.png", "b.jpeg", "b", "c.png", "d.jpg", "d.jpg.png"]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n},A dog\n" for n in names))
    rows = rows_of("csv", tmp_path / "t.csv")
    assert [row["image_id"] for row in rows] == [
        *("a.jpg", "a.png", "b.jpeg", "b", "c", "d", "d.jpg.png")
    ]


def test_addresses_stay_as_they_are_written(tmp_path):
    url = "https://example.org/a/1.jpg?w=640"
    (tmp_path / "t.csv").write_text(f"image,caption\n{url},A dog\n")
    (row,) = rows_of("csv", tmp_path / "t.csv")
    assert (row["image_id"], row["uri"]) == (url, url)


def test_rows_are_gathered_by_a_column_of_ids(tmp_path):
    table = "id,image,caption\n7,a.jpg,one\n8,a.jpg,two\n7,a.jpg,three\n,b.jpg,four\n"
    (tmp_path / "t.csv").write_text(table)
    rows = rows_of("csv", tmp_path / "t.csv", id_column="id")
    assert [(row["image_id"], row["uri"].rsplit("/")[-1]) for row in rows] == [
        *(("7", "a.jpg"), ("8", "a.jpg"), ("b", "b.jpg"))
    ]
    assert captions(rows[0]) == [("7#0", "one"), ("7#1", "three")]
    (tmp_path / "t.csv").write_text("id,image,caption\n7,a.jpg,one\n7,b.jpg,two\n")
    sentence = refused("csv", tmp_path / "t.csv", id_column="id")
    assert "row 2 puts '7' in path 'b.jpg', an earlier one in 'a.jpg'" in sentence
    assert "no column 'uid' (source.id_column)" in refused(
        "csv", tmp_path / "t.csv", id_column="uid"
    )


def test_a_caption_of_a_megabyte_and_one_over_several_lines_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,"' + "x" * 10**6 + '"\nb.jpg,"1\r\n2"\n')
    first, second = rows_of("csv", tmp_path / "t.csv")
    assert len(captions(first)[0][1]) == 10**6
    assert captions(second)[0][1].split() == ["1", "2"]


def test_files_of_a_numbered_pattern_are_parts_in_order(tmp_path):
    for number in range(8, 12):
        (tmp_path / f"{number:02d}.csv").write_text(f"image,caption\n{number}.jpg,A dog\n")
    rows = rows_of("csv", f"{tmp_path}/{{08..10}}.csv")
    assert [row["image_id"] for row in rows] == ["8", "9", "10"]
    assert "12.csv does not exist" in refused("csv", f"{tmp_path}/{{08..12}}.csv")


# ---- Parquet with the images inside ------------------------------------------------------------

BYTES = [b"\xff\xd8 image %d" % k for k in range(10)]


def write_cells(path, cells, type_=None, **columns):
    columns = {"caption": [[f"{k} one", f"{k} two"] for k in range(len(cells))], **columns}
    table = pa.table({"image": pa.array(cells, type_), **columns})
    pq.write_table(table, path, row_group_size=3)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_with_the_bytes_of_the_images(kind, tmp_path):
    cells, type_ = BYTES, pa.large_binary() if kind == "large_binary" else pa.binary()
    if kind == "struct":  # as Hugging Face writes images
        cells = [{"bytes": data, "path": "image.jpg"} for data in BYTES]
        type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write_cells(tmp_path / "train.parquet", cells, type_, split=["train"] * 9 + ["val"])
    rows = rows_of("csv", tmp_path / "train.parquet")
    assert [row["image_id"] for row in rows] == [f"train-{k:06d}" for k in range(10)]
    assert captions(rows[4]) == [("train-000004#0", "4 one"), ("train-000004#1", "4 two")]
    assert rows[9]["split"] == "val"
    assert rows[4]["uri"] == f"{tmp_path}/train.parquet#image/4"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        load = lambda row: sources.load("csv", row["uri"], SourceSettings())  # noqa: E731
        assert list(pool.map(load, rows * 3)) == BYTES * 3


def test_cells_of_a_remote_table_are_read_a_row_group_at_a_time(tmp_path):
    import fsspec

    write_cells(tmp_path / "t.parquet", BYTES)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    rows = rows_of("csv", "memory://tables/*.parquet")
    assert rows[7]["uri"] == "memory:///tables/t.parquet#image/7"
    assert source("csv").load(rows[7]["uri"]) == BYTES[7]
    column = parquet._column("memory:///tables/t.parquet", "image", 2)
    assert len(column) == 3, "the group of rows 6 to 8 and no other"


def test_cells_that_cannot_be_loaded_are_named(tmp_path):
    write_cells(tmp_path / "t.parquet", [BYTES[0], None])
    load, uri = source("csv").load, f"{tmp_path}/t.parquet#image"
    assert [row["uri"] for row in rows_of("csv", tmp_path / "t.parquet")][1] == f"{uri}/1"
    with pytest.raises(InputError, match="no bytes in the table: "):
        load(f"{uri}/1")
    with pytest.raises(InputError, match="has 2 rows; there is no row 2"):
        load(f"{uri}/2")
    with pytest.raises(FileNotFoundError):
        load(f"{tmp_path}/gone.parquet#image/0")


def test_a_table_of_huge_row_groups_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 10)
    write_cells(tmp_path / "t.parquet", BYTES)
    sentence = refused("csv", tmp_path / "t.parquet")
    assert "images in row group 0" in sentence and "row_group_size=100" in sentence


def test_captions_may_be_records(tmp_path):
    records = [[{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": []}]]
    write_cells(tmp_path / "t.parquet", BYTES[:1], caption=records)
    (row,) = rows_of("csv", tmp_path / "t.parquet")
    assert [text for _, text in captions(row)] == ["one", "two"]
    write_cells(tmp_path / "t.parquet", BYTES[:1], caption=[{"words": "one"}])
    (row,) = rows_of("csv", tmp_path / "t.parquet")
    assert "a record of ['words']" in row["captions"][0]["problem"]


def test_splits_and_ids_may_be_numbers(tmp_path):
    write_cells(tmp_path / "t.parquet", BYTES[:2], split=[0, 1], id=[0, 1])
    how = {"id_column": "id", "splits": {"0": "train", "1": "val"}}
    rows = rows_of("csv", tmp_path / "t.parquet", **how)
    assert [(row["image_id"], row["split"]) for row in rows] == [("0", "train"), ("1", "val")]
    assert "found a split called '0'" in refused("csv", tmp_path / "t.parquet")
    write_cells(tmp_path / "t.parquet", BYTES[:2], split=[1, 0])
    table = pq.read_table(tmp_path / "t.parquet")
    about = {"info": {"features": {"split": {"names": ["test", "train"], "_type": "ClassLabel"}}}}
    labelled = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(labelled, tmp_path / "t.parquet")
    assert [row["split"] for row in rows_of("csv", tmp_path / "t.parquet")] == ["train", "test"]


def test_a_damaged_table_is_named(tmp_path):
    write_cells(tmp_path / "t.parquet", BYTES, caption=["x" * 500] * len(BYTES))
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    chunk = pq.read_metadata(tmp_path / "t.parquet").row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    (tmp_path / "t.parquet").write_bytes(data)
    assert "t.parquet is damaged (" in refused("csv", tmp_path / "t.parquet")


def test_a_column_name_that_is_no_text_is_damage_and_no_traceback(tmp_path):
    """Pyarrow decodes the names before anything is asked of the file."""
    pq.write_table(
        pa.table({"image": ["a.jpg"], "caption": ["x"], "split": ["train"]}),
        path := tmp_path / "t.parquet",
    )
    path.write_bytes(path.read_bytes().replace(b"\x05split", b"\x05spl\x80t"))
    with pytest.raises(InputError, match=r"t\.parquet is (not a Parquet file|damaged)"):
        parquet.column_names(str(path))
