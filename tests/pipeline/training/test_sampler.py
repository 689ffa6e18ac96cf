"""Which pairs a step sees."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.training import sampler
from pipeline.training.sampler import Sampler


class Counts:
    """What an order needs of a split: how many captions each image has, and the shards' sizes."""

    def __init__(self, counts: list[int], per_shard: int | list[int]):
        self.caption_count = np.array(counts)
        self.caption_first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        if isinstance(per_shard, int):
            starts = range(0, len(counts), per_shard)
            per_shard = [len(counts[start : start + per_shard]) for start in starts]
        self.ends = np.cumsum(per_shard)
        self.starts = self.ends - per_shard
        most = range(max(counts))
        shards = [self.caption_count[a:b] for a, b in zip(self.starts, self.ends, strict=True)]
        self.having = np.array([[(shard > k).sum() for k in most] for shard in shards])
        self.asked: set[int] = set()  # rows whose captions were asked for

    def __len__(self) -> int:
        return len(self.caption_count)

    def images_having(self, shard: int, more_than: int) -> np.ndarray:
        rows = np.arange(self.starts[shard], self.ends[shard])
        return rows[self.caption_count[rows] > more_than]

    def captions_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.asked |= set(rows.tolist())
        return self.caption_first[rows], self.caption_count[rows]


def order_of(counts, batch_size=4, lanes=2, pairs="caption", seed=0, per_shard=7) -> Sampler:
    split = Counts(counts, per_shard)
    return Sampler(split, batch_size=batch_size, lanes=lanes, pairs=pairs, seed=seed)


def steps_of(order: Sampler, epoch: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image rows, caption rows) of the global batch of every step."""
    return [(rows.reshape(-1), captions.reshape(-1)) for rows, captions in order.epoch(epoch)]


COUNTS = st.lists(st.integers(1, 5), min_size=4, max_size=40)
PAIRS = st.sampled_from(["caption", "image"])
SEED = st.integers(0, 100)


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


def in_one_draw(order: Sampler, epoch: int) -> list[tuple[list, list]]:
    """The steps of an epoch as one generator a round gives them, with arrays of the whole round."""
    split, steps = order.split, []
    for number, size in enumerate(order.sizes):
        rng = np.random.default_rng([order.seed, epoch, number])
        drawn = rng.permutation(len(split.having))
        rows = np.concatenate([np.arange(split.starts[s], split.ends[s]) for s in drawn])
        rows = rows[split.caption_count[rows] > number]
        rows = np.roll(rows, rng.integers(len(rows)))
        share, whole = order.batch_size // order.lanes, size // order.batch_size
        lanes = rows[: whole * order.batch_size].reshape(order.lanes, -1, 1).copy()
        for lane in lanes:
            for start in range(0, len(lane), sampler.SHUFFLE_BLOCK):
                rng.shuffle(lane[start : start + sampler.SHUFFLE_BLOCK])
        rows = lanes.reshape(order.lanes, whole, share).transpose(1, 0, 2)
        turn = (sampler._hash(rows, order.seed, epoch) + number) % split.caption_count[rows]
        captions = split.caption_first[rows] + turn
        steps += zip(rows.tolist(), captions.tolist(), strict=True)
    return steps


def listed(steps) -> list[tuple[list, list]]:
    return [(rows.tolist(), captions.tolist()) for rows, captions in steps]


NINE = st.lists(st.integers(1, 9), min_size=8, max_size=60)
SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def in_shards(counts: list[int], sizes: list[int]) -> list[int]:
    """Sizes of shards that hold them all, the last what is left; shards may hold nothing."""
    ends = np.minimum(np.cumsum([*sizes, len(counts)]), len(counts))
    return np.diff([0, *ends]).tolist()


@settings(max_examples=60, deadline=None)
@given(NINE, SHARDS, PAIRS, SEED, st.integers(0, 3))
def test_a_round_of_one_block_a_lane_has_the_order_it_always_had(counts, sizes, pairs, seed, epoch):
    order = order_of(counts, pairs=pairs, seed=seed, per_shard=in_shards(counts, sizes))
    assert order.version == 1
    assert listed(order.epoch(epoch)) == in_one_draw(order, epoch)


@settings(max_examples=60, deadline=None)
@given(NINE, SHARDS, PAIRS, SEED, st.integers(1, 7))
def test_rounds_of_many_blocks_keep_what_an_epoch_promises(counts, sizes, pairs, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "SHUFFLE_BLOCK", block)
        order = order_of(counts, pairs=pairs, seed=seed, per_shard=in_shards(counts, sizes))
        steps = steps_of(order, 1)
        assert order.version == (2 if len(counts) // 4 * 2 > block else 1)
    assert len(steps) == order.steps
    owner = np.repeat(np.arange(len(counts)), counts)
    for rows, captions in steps:
        assert len(set(rows.tolist())) == 4 and np.array_equal(owner[captions], rows)
    seen = [caption for _, captions in steps for caption in captions.tolist()]
    assert len(seen) == len(set(seen)) == sum(size // 4 * 4 for size in order.sizes)


@settings(max_examples=40, deadline=None)
@given(NINE, SHARDS, PAIRS, SEED, st.integers(1, 7), st.sampled_from([(8, 4), (12, 4), (8, 8)]))
def test_any_step_is_found_at_once_for_any_number_of_workers(
    counts, sizes, pairs, seed, block, sizes_of_batch
):
    batch_size, lanes = sizes_of_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "SHUFFLE_BLOCK", block)
        how = {"batch_size": batch_size, "lanes": lanes, "pairs": pairs, "seed": seed}
        if len(counts) < batch_size:
            return
        order = order_of(counts, **how, per_shard=in_shards(counts, sizes))
        whole = listed(order.epoch(2))
        for start in range(order.steps + 1):
            assert listed(order.epoch(2, start)) == whole[start:]
        for workers in (1, 2, 4):
            for rank in range(workers):
                mine = range(rank, lanes, workers)
                expected = [
                    ([rows[lane] for lane in mine], [captions[lane] for lane in mine])
                    for rows, captions in whole
                ]
                assert listed(order.epoch(2, 0, mine)) == expected


def test_a_step_of_some_lanes_reads_their_own_blocks_alone(monkeypatch):
    monkeypatch.setattr(sampler, "SHUFFLE_BLOCK", 16)
    order = order_of([1] * 4000, batch_size=8, lanes=4, per_shard=10)
    for start in (0, 250, 400):
        order.split.asked = set()
        next(order.epoch(0, start, [1, 3]))
        assert len(order.split.asked) == 2 * 16


def test_a_round_of_blocks_is_mixed_as_well_as_one_that_is_drawn_at_once(monkeypatch):
    """Pairs that meet in two epochs are as many as chance has it, whichever blocks they were in."""
    monkeypatch.setattr(sampler, "SHUFFLE_BLOCK", 64)
    order = order_of([1] * 4096, batch_size=32, lanes=4, per_shard=50)

    def met(steps) -> set[tuple[int, int]]:
        sorted_ = (sorted(np.ravel(rows).tolist()) for rows, _ in steps)
        return {pair for rows in sorted_ for pair in combinations(rows, 2)}

    blocks = len(met(order.epoch(0)) & met(order.epoch(1)))
    once = len(met(in_one_draw(order, 0)) & met(in_one_draw(order, 1)))
    assert blocks < 1.25 * once
