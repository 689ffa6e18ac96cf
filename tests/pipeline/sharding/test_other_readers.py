"""Others read our tars, unchanged: webdataset, Hugging Face datasets, tarfile, open_clip's way."""

import io
import json
import tarfile

import pytest
import webdataset
from PIL import Image

from pipeline.sharding.reading import Sample, Shards
from schemas.settings import Recipe
from tests.helpers.stages import sharded


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    root = str(tmp_path_factory.mktemp("compatible"))
    source = {"kind": "drawn", "train_images": 20, "val_images": 5, "test_images": 0}
    recipe = Recipe(name="t", source={**source, "image_size": 32}, shard={"samples": 8})
    sharded(recipe, root)
    return Shards(root)


@pytest.fixture(scope="module")
def tars(shards) -> list[str]:
    return [shards.tar(name) for name in shards.names("train")]


@pytest.fixture(scope="module")
def samples(shards) -> list[Sample]:
    return list(shards.samples("train"))


def pixels(picture: Image.Image) -> bytes:
    return picture.convert("RGB").tobytes()


def test_webdataset_decodes_every_member(tars, samples):
    found = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in found] == [s.key for s in samples]
    for theirs, ours in zip(found, samples, strict=True):
        assert pixels(theirs["jpg"]) == pixels(ours.load())
        assert theirs["txt"] == ours.captions[0]["text"]
        assert theirs["json"]["captions"] == ours.captions
        assert theirs["json"]["sha256"] == ours.sha256


def test_hugging_face_datasets_loads_them(tars, samples, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    for streaming in (False, True):
        found = datasets.load_dataset(
            "webdataset",
            data_files={"train": tars},
            split="train",
            cache_dir=str(tmp_path),
            streaming=streaming,
        )
        rows = list(found)
        assert [row["__key__"] for row in rows] == [s.key for s in samples]
        for theirs, ours in zip(rows, samples, strict=True):
            assert pixels(theirs["jpg"]) == pixels(ours.load())
            assert theirs["txt"] == ours.captions[0]["text"]
            assert theirs["json"]["image_id"] == ours.image_id


def test_tarfile_lists_plain_files_samples_adjacent(tars, samples):
    names = []
    for path in tars:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                assert member.isfile() and member.mtime == 0 and member.mode == 0o644
                names.append(member.name)
                if member.name.endswith(".json"):
                    json.load(archive.extractfile(member))
                if member.name.endswith(".jpg"):
                    Image.open(io.BytesIO(archive.extractfile(member).read())).load()
    assert names == [f"{s.key}.{end}" for s in samples for end in ("jpg", "txt", "json")]


def test_open_clips_reader_gives_every_pair(tars, samples):
    """The steps of open_clip's `get_wds_dataset`, in its order and with its names."""

    def has_image_and_text(sample: dict) -> bool:
        return "txt" in sample and any(end in sample for end in ("png", "jpg", "jpeg", "webp"))

    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=webdataset.reraise_exception),
        webdataset.select(has_image_and_text),
        webdataset.decode("pilrgb", handler=webdataset.reraise_exception),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=pixels, text=str.split),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(4, partial=False),
    )
    images, texts = ([x for batch in pipeline for x in batch[part]] for part in (0, 1))
    assert images == [pixels(sample.load()) for sample in samples]
    assert texts == [sample.captions[0]["text"].split() for sample in samples]
