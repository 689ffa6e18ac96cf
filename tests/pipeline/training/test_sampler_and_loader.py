"""Which pairs a step sees, and that they are the ones in the tars."""

import io
import os
import tarfile
import threading
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.models import Vocabulary
from pipeline.sharding import decoding
from pipeline.storage import parquet
from pipeline.training.data import Split
from pipeline.training.loader import Loader
from pipeline.training.sampler import Sampler
from schemas.settings import Recipe
from tests.helpers.stages import sharded

SIZE = 24  # pixels: less than the scenes' side, more than half of it


def shards(root, **shard_settings) -> str:
    source = {"kind": "drawn", "train_images": 21, "val_images": 3, "test_images": 0}
    recipe = Recipe(name="t", source={**source, "image_size": 32}, shard=shard_settings)
    sharded(recipe, root)
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return shards(tmp_path_factory.mktemp("batches"), samples=8)


@pytest.fixture
def split(root) -> Split:
    return Split(root, "train", image_size=SIZE)


class Counts:
    """What an order needs of a split: how many captions each image has, and the shards' sizes."""

    def __init__(self, counts: list[int], per_shard: int):
        self.caption_count = np.array(counts)
        self.caption_first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        starts = range(0, len(counts), per_shard)
        self.rows_per_shard = np.array([len(counts[start : start + per_shard]) for start in starts])
        self.shards = self.rows_per_shard

    def __len__(self) -> int:
        return len(self.caption_count)


def order_of(counts, batch_size=4, lanes=2, pairs="caption", seed=0, per_shard: int = 7) -> Sampler:
    split = Counts(counts, per_shard)
    return Sampler(split, batch_size=batch_size, lanes=lanes, pairs=pairs, seed=seed)


def steps_of(order: Sampler, epoch: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image rows, caption rows) of the global batch of every step."""
    return [(rows.reshape(-1), captions.reshape(-1)) for rows, captions in order.epoch(epoch)]


COUNTS = st.lists(st.integers(1, 5), min_size=4, max_size=40)
PAIRS = st.sampled_from(["caption", "image"])
SEED = st.integers(0, 100)


# ---- order -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(COUNTS, PAIRS, SEED, st.integers(0, 3))
def test_every_step_is_a_full_batch_of_different_images_with_captions_of_their_own(
    counts, pairs, seed, epoch
):
    order = order_of(counts, pairs=pairs, seed=seed)
    owner = np.repeat(np.arange(len(counts)), counts)
    steps = steps_of(order, epoch)
    assert len(steps) == order.steps
    for rows, captions in steps:
        assert len(rows) == len(set(rows.tolist())) == 4
        assert np.array_equal(owner[captions], rows)


@settings(max_examples=60, deadline=None)
@given(COUNTS, SEED, st.integers(0, 3))
def test_every_caption_is_seen_once_an_epoch_but_for_what_fills_no_batch(counts, seed, epoch):
    steps = steps_of(order_of(counts, seed=seed), epoch)
    seen = [caption for _, captions in steps for caption in captions.tolist()]
    assert len(seen) == len(set(seen))
    rounds = [sum(count > k for count in counts) for k in range(max(counts))]
    assert sum(counts) - len(seen) == sum(size % 4 for size in rounds)


@settings(max_examples=60, deadline=None)
@given(COUNTS, SEED, st.integers(0, 3))
def test_with_pairs_by_image_every_image_is_seen_once_but_for_what_fills_no_batch(
    counts, seed, epoch
):
    steps = steps_of(order_of(counts, pairs="image", seed=seed), epoch)
    seen = [row for rows, _ in steps for row in rows.tolist()]
    assert len(seen) == len(set(seen)) == len(counts) // 4 * 4


def test_every_image_is_seen_at_most_once_a_round(split):
    order = Sampler(split, batch_size=4, lanes=2, pairs="caption", seed=0)
    steps = steps_of(order)
    for number, size in enumerate(order.sizes):
        mine = [rows for rows, _ in steps[: size // 4]]
        steps = steps[size // 4 :]
        seen = np.concatenate(mine) if mine else np.array([])
        assert len(seen) == len(set(seen.tolist())), number
    assert not steps


@pytest.mark.parametrize("per_shard", [3, 100])
@pytest.mark.parametrize("counts", [[1, 5, 2, 3, 4, 5, 1, 2, 3, 3, 5], [1] * 11])
def test_over_the_epochs_every_image_and_caption_gets_its_turn(counts, per_shard):
    order = order_of(counts, per_shard=per_shard)
    seen = [set(), set()]
    for epoch in range(12):
        for rows, captions in steps_of(order, epoch):
            seen[0] |= set(rows.tolist())
            seen[1] |= set(captions.tolist())
    assert seen == [set(range(len(counts))), set(range(sum(counts)))]


def test_an_epoch_is_the_same_whenever_it_is_asked_for_and_epochs_differ(split):
    def order(seed):
        return Sampler(split, batch_size=4, lanes=2, pairs="caption", seed=seed)

    def flat(order, epoch):
        return np.concatenate([np.stack(step) for step in steps_of(order, epoch)], 1).tolist()

    first = order(seed=1)
    later = flat(first, 3)
    assert flat(first, 3) == later == flat(order(seed=1), 3)
    others = [flat(first, 0), flat(first, 4), flat(order(seed=2), 3)]
    assert all(sorted(other) != later and other != later for other in others)


def test_the_pairs_of_a_batch_change_from_epoch_to_epoch():
    order = order_of([5] * 40)
    together = []
    for epoch in (0, 1):
        batches = [rows.tolist() for rows, _ in steps_of(order, epoch)]
        together.append({frozenset(pair) for rows in batches for pair in combinations(rows, 2)})
    assert len(together[0] & together[1]) < len(together[0]) / 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=8, max_size=40), PAIRS, SEED)
def test_any_number_of_workers_sees_the_same_global_batches_in_as_many_steps(counts, pairs, seed):
    order = order_of(counts, batch_size=8, lanes=4, pairs=pairs, seed=seed)
    whole = [sorted(captions.tolist()) for _, captions in steps_of(order)]
    for size in (1, 2, 4):
        per_worker = [
            [captions[range(rank, 4, size)].reshape(-1) for _, captions in order.epoch(0)]
            for rank in range(size)
        ]
        assert {len(steps) for steps in per_worker} == {order.steps}
        assert {len(step) for steps in per_worker for step in steps} == {8 // size}
        joined = [sorted(np.concatenate(step).tolist()) for step in zip(*per_worker, strict=True)]
        assert joined == whole


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(2, 12))
def test_a_split_that_fills_no_batch_is_refused_with_its_size(counts, batch_size):
    if len(counts) >= batch_size:
        assert order_of(counts, batch_size=batch_size, lanes=1).steps
        return
    found = f"{len(counts)} train images do not fill one batch of {batch_size};"
    with pytest.raises(InputError, match=found):
        order_of(counts, batch_size=batch_size, lanes=1)


# ---- split -------------------------------------------------------------------------------------


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


# ---- loader ------------------------------------------------------------------------------------


def loader_of(split, rank=0, size=1, threads=2) -> Loader:
    order = Sampler(split, batch_size=4, lanes=2, pairs="caption", seed=0)
    vocabulary = Vocabulary.of(split.captions, min_count=1)
    return Loader(order, vocabulary, rank=rank, size=size, max_words=9, threads=threads)


@pytest.fixture
def new_threads():
    """A function that returns the threads that were started in this test and still run."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


def end(new_threads) -> bool:
    """Whether the new threads end."""
    deadline = time.monotonic() + 120
    while new_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not new_threads()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_loader_brings_the_pairs_of_the_order(split, threads):
    loader = loader_of(split, threads=threads)
    batches = list(loader.epoch(1))
    steps = steps_of(loader.order, 1)
    assert len(batches) == len(steps) == loader.order.steps
    vocabulary = Vocabulary.of(split.captions, min_count=1)
    for batch, (rows, captions) in zip(batches, steps, strict=True):
        assert batch.image_rows.tolist() == rows.tolist()
        assert batch.caption_rows.tolist() == captions.tolist()
        words, lengths = vocabulary.encode([split.captions[row] for row in captions], 9)
        assert torch.equal(batch.words, words) and torch.equal(batch.lengths, lengths)
        images = np.stack([split.image(row) for row in rows])
        assert np.array_equal(batch.images.numpy(), images) and batch.images.dtype == torch.uint8


def test_two_loaders_share_the_batches_of_one(split):
    whole = list(loader_of(split).epoch(0))
    halves = [list(loader_of(split, rank=rank, size=2).epoch(0)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [len(whole)] * 2
    for batch, *parts in zip(whole, *halves, strict=True):
        joined = torch.cat([part.caption_rows for part in parts])
        assert sorted(joined.tolist()) == sorted(batch.caption_rows.tolist())


@pytest.mark.timeout(300)
def test_a_broken_tar_ends_the_epoch_with_an_error_and_does_not_hang(tmp_path, new_threads):
    split = Split(shards(tmp_path, samples=8), "train", image_size=SIZE, cache_mb=0)
    tar = Path(split.tars[1])
    tar.write_bytes(tar.read_bytes()[: split.offset[8] + 20])
    with pytest.raises((OSError, ValueError, SyntaxError)):
        list(loader_of(split).epoch(0))
    assert end(new_threads)


@pytest.mark.timeout(300)
def test_a_lost_tar_ends_the_epoch_with_an_error_that_names_it(tmp_path):
    split = Split(shards(tmp_path, samples=8), "train", image_size=SIZE)
    Path(split.tars[1]).unlink()
    with pytest.raises(FileNotFoundError, match="train-000001.tar"):
        list(loader_of(split).epoch(0))


def test_an_epoch_that_is_left_early_leaves_no_thread_behind(split, new_threads):
    for left_after in (1, 3):
        batches = loader_of(split).epoch(0)
        for _ in range(left_after):
            next(batches)
        assert new_threads()
        batches.close()
        assert end(new_threads)


def test_a_finished_epoch_leaves_no_thread_behind(split, new_threads):
    assert len(list(loader_of(split).epoch(0))) > 4  # more than are made ahead
    assert end(new_threads)
