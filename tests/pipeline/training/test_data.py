"""A split's samples: they are the ones in the tars."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import count_words
from pipeline.sharding import decoding, shard
from pipeline.storage import mapped, parquet, store
from pipeline.training.data import Split, Texts, word_counts
from pipeline.training.distributed import ProcessGroup
from schemas.settings import Recipe
from schemas.shard import SIDECAR
from tests.helpers import gloo
from tests.helpers.datasets import SIZE, shards
from tests.helpers.stages import sharded


def ids_of(split: Split) -> list[str]:
    """The ids of the images, row by row."""
    tables = [split.table(number) for number in range(len(split.shards))]
    return [id_ for table in tables for id_ in table["image_id"].to_pylist()]


def test_a_split_has_the_samples_of_its_sidecars_in_order(root, split):
    sidecars = sorted(Path(root, "2-shards").glob("train-*.parquet"))
    rows = [row for file in sidecars for row in parquet.read_table(str(file)).to_pylist()]
    assert len(split) == len(rows) == 21
    assert ids_of(split) == [row["image_id"] for row in rows]
    spans = zip(*split.captions_of(np.arange(len(split))), strict=True)
    for row, (first, count) in zip(rows, spans, strict=True):
        texts = [caption["text"] for caption in row["captions"]]
        assert split.captions[first : first + count] == texts
    texts = [caption["text"] for row in rows for caption in row["captions"]]
    assert list(split.captions) == split.captions[:] == texts and len(split.captions) == len(texts)
    assert split.captions[5] == texts[5]
    assert split.caption_count.tolist() == [len(row["captions"]) for row in rows]
    for wrong in ([len(texts)], [3, -1]):
        with pytest.raises(IndexError):
            split.texts(np.array(wrong))


def test_an_image_is_what_pillow_decodes_from_the_tar(root, split):
    members, names = {}, []
    for tar in Path(root, "2-shards").glob("train-*.tar"):
        with tarfile.open(tar) as archive:
            members |= {m.name: archive.extractfile(m).read() for m in archive}
    for uri in split.sidecars:
        names += parquet.read_table(uri, ["member"])["member"].to_pylist()
    for row in range(len(split)):
        image = Image.open(io.BytesIO(members[names[row]]))
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        assert np.array_equal(split.image(row), np.asarray(image).transpose(2, 0, 1))


def test_an_image_is_the_same_from_a_cache_that_is_full_or_was_never_there(root, split):
    uncached = Split(root, "train", preprocessing=Preprocessing.squash(SIZE), cache_mb=0)
    for row in (0, 7, 20, 7):
        assert np.array_equal(uncached.image(row), split.image(row))
    assert not uncached._cache


def test_a_stream_of_the_tars_gives_the_same_samples_in_the_same_order(split):
    samples = [s for tar in split.tars for s in decoding.stream(tar, Preprocessing.squash(SIZE))]
    assert [about["image_id"] for about, _ in samples] == ids_of(split)
    spans = list(zip(*split.captions_of(np.arange(len(split))), strict=True))
    for row, (about, image) in enumerate(samples):
        assert np.array_equal(image, split.image(row))
        first, count = spans[row]
        texts = [caption["text"] for caption in about["captions"]]
        assert texts == split.captions[first : first + count]


def test_shards_of_features_give_the_arrays_that_were_put_in(tmp_path):
    features = np.random.default_rng(0).normal(size=(6, 3, 5)).astype(np.float32)
    np.save(tmp_path / "train_ims.npy", features)
    (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(6)))
    recipe = Recipe(name="t", source={"kind": "precomp", "path": str(tmp_path)})
    sharded(recipe, tmp_path)
    split = Split(str(tmp_path), "train", preprocessing=Preprocessing.squash(SIZE))
    assert split.features == 5
    for row, image_id in enumerate(ids_of(split)):
        assert np.array_equal(split.image(row), features[int(image_id.split("-")[1])])
    streamed = [array for _, array in decoding.stream(split.tars[0], Preprocessing.squash(SIZE))]
    assert all(np.array_equal(array, split.image(row)) for row, array in enumerate(streamed))


def test_an_unknown_split_is_answered_with_those_there_are(root):
    with pytest.raises(InputError, match="no samples in split 'vla'; this run has train, val"):
        Split(root, "vla", preprocessing=Preprocessing.squash(SIZE))


def test_a_tar_that_was_made_again_is_read_anew(tmp_path):
    for seed in (0, 1):
        split = Split(
            shards(tmp_path, samples=21, seed=seed),
            "train",
            preprocessing=Preprocessing.squash(SIZE),
        )
        samples = list(decoding.stream(split.tars[0], Preprocessing.squash(SIZE)))
        for row, (_, image) in enumerate(samples):
            assert np.array_equal(split.image(row), image)


def test_reading_from_very_many_tars_leaves_few_of_them_open(root, tmp_path):
    split = Split(root, "train", preprocessing=Preprocessing.squash(SIZE), cache_mb=0)
    image, tar = split.image(0), split.tars[0]
    before = len(os.listdir("/dev/fd"))
    for number in range(700):
        split.tars[0] = str(tmp_path / f"{number}.tar")
        os.symlink(tar, split.tars[0])
        assert np.array_equal(split.image(0), image)
    assert len(os.listdir("/dev/fd")) - before <= 520


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """A node's folder that holds nothing yet: what it holds is told apart by contents alone."""
    monkeypatch.setenv("HALFTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "_open", {})


def counted(folder, counts: list[list[int]], images_with: bool = True) -> Split:
    """A split of hand-written sidecars: how many captions each image of each shard has."""
    entries = []
    for number, of_shard in enumerate(counts):
        name = f"train-{number:06d}"
        rows = [{"image_id": "no", "captions": [], "split": "train", "reason": "rejected"}]
        for i, n in enumerate(of_shard):
            texts = [{"caption_id": f"{i}#{c}", "text": f"{name} {i} {c}"} for c in range(n)]
            about = {"image_id": f"{name}/{i}", "captions": texts, "split": "train"}
            rows.append(about | {"offset": 512 * i, "size": 9, "member": f"{i}.jpg"})
        summary = {"split": "train", "samples": len(of_shard), "captions": sum(of_shard)}
        summary |= {"images_with": shard._images_with(of_shard)} if images_with else {}
        summary |= {"files": {f"{name}.tar": {"bytes": 1, "sha256": "0" * 64}}}
        uri = f"{folder}/2-shards/{name}.parquet"
        table = pa.Table.from_pylist(rows, SIDECAR)
        entries.append(parquet.write_table(uri, table, "f", summary) | {"name": name})
    index = {"pieces": entries, "version": "v", "settings": {}}
    store.write_json(f"{folder}/2-shards/index.json", index)
    return Split(str(folder), "train", preprocessing=Preprocessing.squash(SIZE))


UNEQUAL = [[3], [1, 9, 2, 1, 5], [], [2, 2], [1] * 7]


@pytest.mark.parametrize("images_with", [True, False])
def test_what_the_index_says_of_shards_is_what_their_sidecars_hold(tmp_path, images_with):
    split = counted(tmp_path, UNEQUAL, images_with)
    every = [n for of_shard in UNEQUAL for n in of_shard]
    assert len(split) == len(every) and len(split.captions) == sum(every)
    filled = [of_shard for of_shard in UNEQUAL if of_shard]
    assert split.having.tolist() == [[sum(n > k for n in s) for k in range(9)] for s in filled]
    rows = np.random.default_rng(0).permutation(len(every)).repeat(2)
    first, count = split.captions_of(rows)
    ends = np.concatenate([[0], np.cumsum(every)])
    assert np.array_equal(first, ends[rows]) and np.array_equal(count, np.array(every)[rows])
    for shard_, of_shard in enumerate(filled):
        start = split.images.starts[shard_]
        for k in range(9):
            expected = [start + i for i, n in enumerate(of_shard) if n > k]
            assert split.images_having(shard_, k).tolist() == expected
    asked = np.random.default_rng(1).integers(0, sum(every), 50)
    assert split.texts(asked) == [split.captions[row] for row in asked.tolist()]
    assert split.texts(np.array([], np.int64)) == []
    # The second image of the shard after the empty one, and the first of all.
    tar = {"bytes": 1, "sha256": "0" * 64}
    places = [(2, split.tars[2], tar, 512, 9), (0, split.tars[0], tar, 0, 9)]
    assert split.places(np.array([7, 0])) == places
    assert split.name(7) == f"1.jpg of {split.tars[2]}"


def test_what_a_split_holds_is_of_its_shards_and_not_of_their_captions(tmp_path):
    def held(images: int) -> int:
        split = counted(tmp_path / str(images), [[1] * images] * 4)
        split.texts(np.arange(len(split.captions)))
        split.images_having(2, 0), split.captions_of(np.arange(len(split)))
        return len(pickle.dumps(split))

    assert held(1000) < held(10) + 100  # digits


def test_a_sidecar_that_is_not_what_the_index_says_is_refused(tmp_path):
    split = counted(tmp_path, [[1, 2], [1]])
    table = parquet.read_table(split.sidecars[1])
    parquet.write_table(split.sidecars[1], table, "another", {})
    assert split.texts(np.array([0, 2])) == ["train-000000 0 0", "train-000000 1 1"]
    with pytest.raises(InputError, match="train-000001.parquet has other bytes than its stage"):
        split.texts(np.array([3]))


def test_words_are_counted_once_for_all_models(tmp_path, monkeypatch):
    split = counted(tmp_path, UNEQUAL)
    counts = word_counts(split, ProcessGroup())
    assert counts == count_words(split.captions) and counts["train"] == len(split.captions)
    with monkeypatch.context() as patch:
        patch.setattr(Texts, "of_shard", None)  # nothing is read again
        again = Split(str(tmp_path), "train", preprocessing=Preprocessing.squash(SIZE))
        assert word_counts(again, ProcessGroup()) == counts
    other = counted(tmp_path, UNEQUAL[:2])
    assert word_counts(other, ProcessGroup()) == count_words(other.captions) != counts


def words_worker(rank: int, size: int, folder: str) -> None:
    def work() -> None:
        split = Split(folder, "train", preprocessing=Preprocessing.squash(SIZE))
        store.write_json(f"{folder}/{rank}.json", word_counts(split, ProcessGroup()))

    gloo.meet(rank, size, folder, work)


def test_workers_count_the_words_together(tmp_path):
    split = counted(tmp_path, UNEQUAL)
    gloo.together(2, words_worker, str(tmp_path))
    for rank in range(2):
        assert store.read_json(f"{tmp_path}/{rank}.json") == count_words(split.captions)
