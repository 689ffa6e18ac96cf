"""Hugging Face data sets: saved folders as the `datasets` library writes them, and its absence."""

import concurrent.futures
import sys

import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sources import huggingface, source
from schemas.settings import SourceSettings
from tests.pipeline.sources.test_formats import captions, refused, rows_of

IMAGES = [b"\xff\xd8 image %d" % k for k in range(6)]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    huggingface._found.cache_clear()
    huggingface._images.cache_clear()
    return datasets


def flickr30k(datasets, images=IMAGES, **columns):
    """As nlphuji/flickr30k: an image, its captions in a list, Karpathy's split in a column."""
    columns = {
        "image": [{"bytes": data, "path": "same.jpg"} for data in images],
        "caption": [[f"{k} one", f"{k} two"] for k in range(len(images))],
    } | columns
    dataset = datasets.Dataset.from_dict(columns)
    return dataset.cast_column("image", datasets.Image(decode=False))


def test_a_saved_folder_with_splits(datasets, tmp_path):
    dataset = flickr30k(datasets)
    splits = {"train": dataset.select([5, 1, 3]), "validation": dataset.select([0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    rows = rows_of("huggingface", tmp_path / "saved")
    assert [row["image_id"] for row in rows] == [
        *(f"train-{k:06d}" for k in range(3)),
        "validation-000000",
    ]
    assert [row["split"] for row in rows] == ["train"] * 3 + ["val"]
    assert captions(rows[0]) == [("train-000000#0", "5 one"), ("train-000000#1", "5 two")]
    assert rows[1]["uri"] == f"{tmp_path}/saved#train/image/1"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        load = lambda row: sources.load(row["source"], row["uri"], SourceSettings())  # noqa: E731
        assert list(pool.map(load, rows * 5)) == [IMAGES[k] for k in (5, 1, 3, 0)] * 5


def test_a_column_says_the_split_and_another_the_id(datasets, tmp_path):
    columns = {"split": ["train", "test", "test"], "filename": ["a.jpg", "b.jpg", "c.jpg"]}
    flickr30k(datasets, IMAGES[:3], **columns).save_to_disk(tmp_path / "saved")
    rows = rows_of("huggingface", tmp_path / "saved", id_column="filename")
    assert [row["image_id"] for row in rows] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [row["split"] for row in rows] == ["train", "test", "test"]


def test_a_row_a_caption_is_gathered_by_id(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "PART_ROWS", 2)
    sentences = [{"raw": f"caption {k}", "tokens": []} for k in range(6)]
    saved = flickr30k(datasets, caption=sentences, id=[7, 7, 7, 8, 8, 8])
    saved.save_to_disk(tmp_path / "saved")
    seven, eight = rows_of("huggingface", tmp_path / "saved", id_column="id")
    assert (seven["image_id"], eight["uri"].rsplit("/")[-1]) == ("7", "3")
    assert captions(eight) == [(f"8#{k}", f"caption {k + 3}") for k in range(3)]
    assert len(rows_of("huggingface", tmp_path / "saved")) == 6


def test_parts_are_ranges_of_rows_and_depend_on_the_split_s_contents(datasets, tmp_path):
    huggingface_parts = source("huggingface").parts
    flickr30k(datasets).save_to_disk(tmp_path / "a")
    settings = SourceSettings(kind="huggingface", path=str(tmp_path / "a"))
    assert huggingface_parts(settings) == ["train:0:6"]
    flickr30k(datasets).select(range(5)).save_to_disk(tmp_path / "b")
    other = SourceSettings(kind="huggingface", path=str(tmp_path / "b"))
    module = source("huggingface")
    assert module.inputs(settings, "train:0:6") == module.inputs(settings, "train:0:6")
    assert module.inputs(settings, "train:0:6") != module.inputs(other, "train:0:5")


def test_columns_of_paths_addresses_and_plain_bytes(datasets, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"a file")
    paths = ["a.jpg", "https://example.org/b.jpg"]
    columns = {"image": paths, "text": ["A dog", "A cat"], "raw": IMAGES[:2]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    rows = rows_of("huggingface", tmp_path / "saved", tmp_path / "images", caption_column="text")
    assert [row["uri"] for row in rows] == [f"{tmp_path}/images/a.jpg", paths[1]]
    assert source("huggingface").load(rows[0]["uri"]) == b"a file"
    rows = rows_of("huggingface", tmp_path / "saved", image_column="raw", caption_column="text")
    assert [source("huggingface").load(row["uri"]) for row in rows] == IMAGES[:2]


def test_images_kept_as_files_beside_the_table(datasets, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a file")
    cells = [{"bytes": None, "path": str(tmp_path / "a.jpg")}, None]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    )
    dataset = datasets.Dataset.from_dict({"image": cells, "caption": ["a", "b"]}, features)
    huggingface._found.cache_clear()
    dataset.save_to_disk(tmp_path / "saved", num_proc=None)
    first, second = rows_of("huggingface", tmp_path / "saved")
    assert source("huggingface").load(first["uri"]) == b"a file"
    with pytest.raises(InputError, match="no image in the row: "):
        source("huggingface").load(second["uri"])


def test_what_is_not_such_a_data_set_is_named(datasets, tmp_path):
    sentence = refused("huggingface", tmp_path)
    assert str(tmp_path) in sentence and "expected a folder that Dataset.save_to_disk" in sentence
    flickr30k(datasets).save_to_disk(tmp_path / "saved")
    wrong = refused("huggingface", tmp_path / "saved", caption_column="captions")
    assert "no column 'captions' (source.caption_column); did you mean 'caption'?" in wrong
    assert "does not name a data set; expected" in refused("huggingface", "hf://flickr30k")


def test_a_name_of_the_hub_is_looked_up_with_its_revision_and_configuration(datasets, monkeypatch):
    asked = []

    def load_dataset(name, config, revision):
        asked.append((name, config, revision))
        return datasets.DatasetDict({"test": flickr30k(datasets)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["hf://me/data", "hf://datasets/me/data@v1", "hf://me/data@v1/small"]
    for name in names:
        rows = rows_of("huggingface", name)
        assert rows[5]["uri"] == f"{name}#test/image/5" and rows[5]["split"] == "test"
        assert source("huggingface").load(rows[5]["uri"]) == IMAGES[5]
    assert asked == [("me/data", None, None), ("me/data", None, "v1"), ("me/data", "small", "v1")]


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    huggingface._found.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the datasets library; run `pip install" in refused("huggingface", tmp_path)
