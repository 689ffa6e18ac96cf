"""Reading shards from one's own code: by name, one sample, a stream; in every kind of store."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.errors import InputError, StageMissing
from pipeline.sharding.reading import Shards
from pipeline.storage import store
from schemas.settings import Recipe
from tests.helpers.stages import sharded

DRAWN = {"kind": "drawn", "train_images": 20, "val_images": 5, "test_images": 3, "image_size": 32}


def drawn(root: str, **source) -> str:
    recipe = Recipe(name="t", source=source or DRAWN, shard={"samples": 8})
    sharded(recipe, root)
    return root


@pytest.fixture
def shards(folder) -> Shards:
    return Shards(drawn(folder))


def members(tar: str) -> dict[str, bytes]:
    """The bytes of every member, as `tarfile` finds them."""
    with tarfile.open(fileobj=io.BytesIO(store.read_bytes(tar))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_shards_are_named_in_order(shards):
    train = ["train-000000", "train-000001", "train-000002"]
    assert shards.names("train") == train and shards.names("val") == ["val-000000"]
    assert shards.names() == [*train, "val-000000", "test-000000"]
    assert store.exists(shards.tar("train-000002"))


def test_every_sample_is_what_its_tar_holds(shards):
    samples = list(shards.samples())
    assert len(samples) == 28
    for sample in samples:
        found = members(sample.tar)
        assert sample.read() == found[sample.member]
        about = json.loads(found[f"{sample.key}.json"])
        assert about["image_id"] == sample.image_id and about["captions"] == sample.captions
        assert sample.load().size == (32, 32)
    assert [sample.image_id for sample in samples if sample.split == "val"] == [
        f"val-{n:06d}" for n in range(5)
    ]


def test_a_picture_is_as_large_as_the_shards_took_it(shards, monkeypatch):
    """`shard.max_pixels` was checked when they were written; Pillow has a limit of its own."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 3)
    assert [sample.load().size for sample in shards.samples("val")] == [(32, 32)] * 5


def test_a_sample_is_found_by_its_image_and_no_other_bytes_are_read(shards, monkeypatch):
    whole = {sample.image_id: sample.read() for sample in shards.samples()}
    shards.sample("train-000000")  # reads the sidecars
    read = []
    real = store.read_bytes

    def spy(uri: str, offset: int = 0, size: int | None = None) -> bytes:
        data = real(uri, offset, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(store, "read_bytes", spy)
    for image_id in ("train-000019", "test-000002", "train-000007"):
        assert shards.sample(image_id).read() == whole[image_id]
        assert read.pop() == len(whole[image_id]) and not read


def test_a_range_of_an_object_is_asked_of_the_store_as_a_range(bucket, tmp_path):
    """Counted by the client that talks to the S3 server."""
    import fsspec

    sample = Shards(drawn(f"{bucket}/{tmp_path.name}")).sample("val-000003")
    received = []
    s3 = fsspec.filesystem("s3", use_listings_cache=False).s3
    s3.meta.events.register(
        "after-call.s3.GetObject",
        lambda parsed, **_: received.append(int(parsed["ContentLength"])),
        unique_id="count",
    )
    assert len(sample.read()) == sample.size
    s3.meta.events.unregister("after-call.s3.GetObject", unique_id="count")
    assert received == [sample.size]


def test_a_stream_goes_through_a_split_in_order(shards):
    samples = list(shards.samples("train"))
    streamed = list(shards.stream("train"))
    assert [s["__key__"] for s in streamed] == [s.key for s in samples]
    assert [s["jpg"] for s in streamed] == [s.read() for s in samples]
    assert [s["txt"].decode() for s in streamed] == [s.captions[0]["text"] for s in samples]


def test_a_stream_feeds_a_webdataset_pipeline_epoch_after_epoch(shards):
    pipeline = webdataset.DataPipeline(
        lambda: shards.stream("train"),
        webdataset.shuffle(10),
        webdataset.decode("rgb8"),
        webdataset.to_tuple("jpg", "txt"),
        webdataset.batched(4),
    )
    for _ in range(2):
        batches = list(pipeline)
        assert [images.shape for images, _ in batches] == [(4, 32, 32, 3)] * 5
        assert len({text for _, texts in batches for text in texts}) > 10


def test_features_come_back_as_the_arrays_that_were_put_in(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3, 5)).astype(np.float32)
    np.save(tmp_path / "train_ims.npy", features)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(6)))
    shards = Shards(drawn(str(tmp_path / "run"), kind="precomp", path=str(tmp_path)))
    for sample in shards.samples("train"):
        row = int(sample.image_id.split("-")[1])
        assert np.array_equal(sample.load(), features[row])
        assert not isinstance(sample.load(), Image.Image)


def test_what_is_not_there_is_answered_with_what_is(shards, tmp_path):
    with pytest.raises(InputError, match="no split 'trian' in .*; did you mean 'train'"):
        shards.names("trian")
    with pytest.raises(InputError, match="no shard 'train-00002' in .*did you mean 'train-000002'"):
        shards.tar("train-00002")
    with pytest.raises(InputError, match="no sample 'x' among the 28 in .*; give an image_id"):
        shards.sample("x")
    with pytest.raises(StageMissing, match="nothing in .*; run `halftone shard` first"):
        Shards(tmp_path / "nowhere")


def test_bytes_that_changed_in_the_tar_are_not_handed_out(shards):
    sample = shards.sample("val-000002")
    data = bytearray(store.read_bytes(sample.tar))
    data[sample.offset + 100] ^= 1
    store.write_bytes(sample.tar, bytes(data))
    with pytest.raises(InputError, match="val-000002.jpg in .* has other bytes than when it was"):
        sample.read()


def test_a_tar_that_lost_its_end_is_not_taken_for_a_whole_one(shards):
    sample = list(shards.samples("val"))[3]
    data = store.read_bytes(sample.tar)
    store.write_bytes(sample.tar, data[: sample.offset - tarfile.BLOCKSIZE])  # between samples
    with pytest.raises(InputError, match="holds 3 samples, its index says 5; delete it"):
        list(shards.stream("val"))
    store.write_bytes(sample.tar, data[: sample.offset + 100])
    with pytest.raises(InputError, match="is torn .*; delete it and run `halftone shard` again"):
        list(shards.stream("val"))
