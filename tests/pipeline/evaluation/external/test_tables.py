"""Vectors in Parquet of other programs: as pandas, arrow and others write them."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.evaluation import external
from pipeline.evaluation.external import tables

IMAGES = np.array([[1, 0, 0.5], [0, 1, 0.25]], np.float32)
TEXTS = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]], np.float32)
ROWS = {
    "id": ["a", "b", "a0", "a1", "b0"],
    "image_id": ["a", "b", "a", "a", "b"],
    "modality": ["image", "image", "text", "text", "text"],
    "vector": [*IMAGES.tolist(), *TEXTS.tolist()],
}


def written(path, **changed) -> str:
    columns = {k: v for k, v in (ROWS | changed).items() if v is not None}
    pq.write_table(pa.table(columns), path)
    return str(path)


def check(found: tables.Table) -> None:
    assert found[:3] == (["a", "b"], ["a0", "a1", "b0"], ["a", "a", "b"])
    assert (found.images == IMAGES).all() and (found.texts == TEXTS).all()
    assert found.images.dtype == np.float32


@pytest.mark.parametrize("inner", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda t: pa.list_(t, 3)])
def test_vectors_are_lists_of_any_kind(tmp_path, inner, kind):
    vector = pa.array([np.array(v, np.float16) for v in ROWS["vector"]], kind(pa.float16()))
    check(tables.read(written(tmp_path / "t.parquet", vector=vector.cast(kind(inner)))))


def test_a_data_frame_and_a_folder_of_parts_are_read(tmp_path):
    frame = pd.DataFrame(ROWS | {"more": range(5)})
    frame.set_index("more").to_parquet(tmp_path / "frame.parquet")
    check(tables.read(str(tmp_path / "frame.parquet")))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "_SUCCESS").touch()
    for part in range(5):
        frame[part : part + 1].to_parquet(tmp_path / "parts" / f"part-{part}.parquet")
    check(tables.read(str(tmp_path / "parts")))
    scores = external.of_table(str(tmp_path / "parts"))
    assert scores.block("i2t", [0]).tolist() == [[1, 0.5, 0]]


def test_vectors_may_be_a_tensor_column(tmp_path):
    of = pa.FixedShapeTensorArray.from_numpy_ndarray(np.concatenate([IMAGES, TEXTS]))
    check(tables.read(written(tmp_path / "t.parquet", vector=of)))


@pytest.mark.parametrize(
    "changed",
    [
        {"modality": ["Image", "IMAGE ", "Text", "caption", "sentence"]},
        {"modality": pa.array(ROWS["modality"]).dictionary_encode()},
        {"id": pa.array(ROWS["id"], pa.large_string())},
        {"id": [id_.encode() for id_ in ROWS["id"]]},
        {"image_id": None, "Image_ID": ROWS["image_id"]},
        {"image_id": ["7", "9", "7", "7", "9"]},  # another name of the same images
        {"image_id": [7, 9, 7, 7, 9]},
        {"image_id": [7.0, 9.0, 7.0, 7.0, 9.0]},
    ],
)
def test_ids_and_sides_are_read_as_others_write_them(tmp_path, changed):
    check(tables.read(written(tmp_path / "t.parquet", **changed)))


def test_numbers_are_ids_by_their_digits(tmp_path):
    whole = {"id": [391895, 2, 1, 2, 3], "image_id": [391895, 2, 391895, 2, 2]}
    for kind in (int, float):
        numbers = {name: [kind(n) for n in column] for name, column in whole.items()}
        found = tables.read(written(tmp_path / "t.parquet", **numbers))
        assert found[:3] == (["391895", "2"], ["1", "2", "3"], ["391895", "2", "2"])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"modality": None}, "has no column 'modality', but id, image_id, vector; give Parquet"),
        ({"modality": ["image", "image", "text", "video", "text"]}, "row 3: modality 'video'; wr"),
        ({"modality": ["image", "image", None, "text", "text"]}, "row 2: modality is None"),
        ({"modality": ["text"] * 5}, "holds no image"),
        ({"modality": ["image"] * 5, "image_id": [*"abcde"]}, "holds no text"),
        ({"id": ["a", "a", "a0", "a1", "b0"]}, "images: 1 ids are there twice, the first 'a'"),
        ({"id": ["a", "b", "a0", "a0", "b0"]}, "texts: 1 ids are there twice, the first 'a0'"),
        ({"id": ["a", "b", "", "a1", "b0"]}, "texts: the id in place 1 is empty"),
        ({"id": [0.5, 1, 2, 3, 4]}, "row 0: id is 0.5 .double.; give every row a text or a whole"),
        ({"id": [b"\xff", b"1", b"2", b"3", b"4"]}, "row 0: id .* is not UTF-8"),
        ({"image_id": [*"abaxb"]}, "1 of 3 texts are of images that are not there, the first 'a1'"),
        ({"vector": ["[1, 0]"] * 5}, "vector is string; give lists of numbers"),
        ({"vector": [[[1.0]]] * 5}, "vector is list<.*; give lists of numbers"),
        (
            {"vector": [[1, 2], [1, 2], [1], [1, 2], [1, 2]]},
            "row 2: vector holds 1 numbers, the",
        ),
        ({"vector": [[1.0], [1.0], None, [1.0], [1.0]]}, "row 2: vector holds none, the first 1"),
        ({"vector": [[1.0], [1.0], [1.0], [None], [1.0]]}, "row 3: vector holds NaN, infinity or"),
        ({"vector": [[1.0], [np.nan], [1.0], [1.0], [1.0]]}, "row 1: vector holds NaN"),
        ({"vector": [[1.0], [1.0], [1e200], [1.0], [1.0]]}, "row 2: vector holds NaN"),
        ({"vector": [[]] * 5}, "vector"),
    ],
)
def test_what_says_nothing_is_refused_with_its_row(tmp_path, changed, sentence):
    with pytest.raises(InputError, match=sentence):
        tables.read(written(tmp_path / "t.parquet", **changed))


def test_what_is_no_table_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no file .*gone.parquet; give Parquet with"):
        tables.read(str(tmp_path / "gone.parquet"))
    with pytest.raises(InputError, match="is a folder"):
        tables.read(str(tmp_path))
    uri = written(tmp_path / "t.parquet")
    torn = (tmp_path / "t.parquet").read_bytes()
    for data in (torn[:-9], torn[:40] + torn[60:], b"", b"id,image_id\n"):
        (tmp_path / "t.parquet").write_bytes(data)
        with pytest.raises(InputError, match="is no Parquet, or torn"):
            tables.read(uri)
    pq.write_table(pa.table(ROWS).slice(0, 0), uri)
    with pytest.raises(InputError, match="holds no row"):
        tables.read(uri)
    (tmp_path / "parts").mkdir()
    written(tmp_path / "parts" / "a.parquet")
    written(tmp_path / "parts" / "b.parquet", vector=[[1.0]] * 5)
    with pytest.raises(InputError, match="of several widths: 3 in .*a.parquet, 1 in .*b.parquet"):
        tables.read(str(tmp_path / "parts"))
