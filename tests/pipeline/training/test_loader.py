"""Batches made ahead by threads: those of the sampler, and no thread is left behind."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.models import Vocabulary
from pipeline.training.data import Split
from pipeline.training.loader import Loader
from pipeline.training.sampler import Sampler
from tests.helpers.datasets import SIZE, shards
from tests.pipeline.training.test_sampler import steps_of


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
    tar.write_bytes(tar.read_bytes()[: split.place(8).offset + 20])
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
