"""A split's samples: they are the ones in the tars."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.sharding import decoding
from pipeline.storage import parquet
from pipeline.training.data import Split
from schemas.settings import Recipe
from tests.helpers.datasets import SIZE, shards
from tests.helpers.stages import sharded


def test_a_split_has_the_samples_of_its_sidecars_in_order(root, split):
    sidecars = sorted(Path(root, "2-shards").glob("train-*.parquet"))
    rows = [row for file in sidecars for row in parquet.read_table(str(file)).to_pylist()]
    assert len(split) == len(rows) == 21
    assert split.table["image_id"].to_pylist() == [row["image_id"] for row in rows]
    for row, count, first in zip(rows, split.caption_count, split.caption_first, strict=True):
        texts = [caption["text"] for caption in row["captions"]]
        assert split.captions[first : first + count] == texts


def test_an_image_is_what_pillow_decodes_from_the_tar(root, split):
    members = {}
    for tar in Path(root, "2-shards").glob("train-*.tar"):
        with tarfile.open(tar) as archive:
            members |= {m.name: archive.extractfile(m).read() for m in archive}
    for row in range(len(split)):
        image = Image.open(io.BytesIO(members[split.table["member"][row].as_py()]))
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert np.array_equal(split.image(row), np.asarray(image).transpose(2, 0, 1))


def test_an_image_is_the_same_from_a_cache_that_is_full_or_was_never_there(root, split):
    uncached = Split(root, "train", image_size=SIZE, cache_mb=0)
    for row in (0, 7, 20, 7):
        assert np.array_equal(uncached.image(row), split.image(row))
    assert not uncached._cache


def test_a_stream_of_the_tars_gives_the_same_samples_in_the_same_order(split):
    samples = [s for tar in split.tars for s in decoding.stream(tar, image_size=SIZE)]
    assert [about["image_id"] for about, _ in samples] == split.table["image_id"].to_pylist()
    for row, (about, image) in enumerate(samples):
        assert np.array_equal(image, split.image(row))
        first, count = split.caption_first[row], split.caption_count[row]
        texts = [caption["text"] for caption in about["captions"]]
        assert texts == split.captions[first : first + count]


def test_shards_of_features_give_the_arrays_that_were_put_in(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3, 5)).astype(np.float32)
    np.save(tmp_path / "train_ims.npy", features)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(6)))
    recipe = Recipe(name="t", source={"kind": "precomp", "path": str(tmp_path)})
    sharded(recipe, tmp_path)
    split = Split(str(tmp_path), "train", image_size=SIZE)
    assert split.features == 5
    for row, image_id in enumerate(split.table["image_id"].to_pylist()):
        assert np.array_equal(split.image(row), features[int(image_id.split("-")[1])])
    streamed = [array for _, array in decoding.stream(split.tars[0], image_size=SIZE)]
    assert all(np.array_equal(array, split.image(row)) for row, array in enumerate(streamed))


def test_an_unknown_split_is_answered_with_those_there_are(root):
    with pytest.raises(InputError, match="no samples in split 'vla'; this run has train, val"):
        Split(root, "vla", image_size=SIZE)


def test_a_tar_that_was_made_again_is_read_anew(tmp_path):
    for seed in (0, 1):
        split = Split(shards(tmp_path, samples=21, seed=seed), "train", image_size=SIZE)
        samples = list(decoding.stream(split.tars[0], image_size=SIZE))
        for row, (_, image) in enumerate(samples):
            assert np.array_equal(split.image(row), image)


def test_reading_from_very_many_tars_leaves_few_of_them_open(root, tmp_path):
    split = Split(root, "train", image_size=SIZE, cache_mb=0)
    image, tar = split.image(0), split.tars[0]
    before = len(os.listdir("/dev/fd"))
    for number in range(700):
        split.tars[0] = str(tmp_path / f"{number}.tar")
        os.symlink(tar, split.tars[0])
        assert np.array_equal(split.image(0), image)
    assert len(os.listdir("/dev/fd")) - before <= 520
