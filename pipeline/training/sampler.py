"""Which pairs a step sees: a function of seed, epoch and step."""

from collections.abc import Iterator

import numpy as np

from pipeline.errors import InputError
from pipeline.training.data import Split

SHUFFLE_BLOCK = 4096  # samples permuted together: the shards of a block are read as one stretch


class Sampler:
    """Which pairs each step of an epoch sees.

    With `neighbours` (M, K), image rows near to each image and -1 where there are no more, images
    go through the epoch in groups of `group` that are near to each other, whichever shard they lie
    in.

    An epoch is a number of rounds; in a round every image is seen at most once, so two captions of
    one image never meet in a batch. With pairs="caption", round k shows the images that have more
    than k captions, each with another one of its captions. Only whole batches are made: up to
    batch_size - 1 images sit out a round, others in each.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        lanes: int,
        pairs: str,
        seed: int,
        group: int = 1,
        neighbours: np.ndarray | None = None,
    ):
        self.split, self.batch_size, self.lanes, self.seed = split, batch_size, lanes, seed
        self.group, self.neighbours = group, neighbours
        rounds = int(split.caption_count.max()) if pairs == "caption" else 1
        self.sizes = [int((split.caption_count > k).sum()) for k in range(rounds)]
        self.steps = sum(size // batch_size for size in self.sizes)
        if not self.steps:
            raise InputError(
                f"{len(split)} train images do not fill one batch of {batch_size}; "
                "lower --train.batch_size"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image rows, caption rows) of each step from `start`: (lanes, batch_size / lanes)."""
        for number, size in enumerate(self.sizes):
            steps = size // self.batch_size
            if start < steps:
                rows = self._round(epoch, number)[start:]
                # Every image goes through its captions from a start drawn per epoch.
                turn = (_hash(rows, self.seed, epoch) + number) % self.split.caption_count[rows]
                captions = self.split.caption_first[rows] + turn
                yield from zip(rows, captions, strict=True)
            start = max(0, start - steps)

    def _round(self, epoch: int, number: int) -> np.ndarray:
        """(steps, lanes, batch_size / lanes) image rows of one round."""
        rng = np.random.default_rng([self.seed, epoch, number])
        shards = rng.permutation(len(self.split.shards))
        ends = np.cumsum(self.split.rows_per_shard)
        starts = ends - self.split.rows_per_shard
        rows = np.concatenate([np.arange(starts[s], ends[s]) for s in shards])
        rows = rows[self.split.caption_count[rows] > number]
        rows = np.roll(rows, rng.integers(len(rows)))  # who sits out is drawn anew every round
        share = self.batch_size // self.lanes
        steps = len(rows) // self.batch_size
        if self.group > 1:
            rows = self._grouped(rng.permutation(rows))
        lanes = rows[: steps * self.batch_size].reshape(self.lanes, -1, self.group).copy()
        for lane in lanes:
            for start in range(0, len(lane), SHUFFLE_BLOCK):
                rng.shuffle(lane[start : start + SHUFFLE_BLOCK])
        return lanes.reshape(self.lanes, steps, share).transpose(1, 0, 2)

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        """The rows again, first in groups of neighbours, then those whose group is not full."""
        free = np.zeros(len(self.split), bool)
        free[rows] = True
        full, rest = [], []
        for row in rows:
            if not free[row]:
                continue
            free[row], group = False, [row]
            for near in self.neighbours[row]:
                if near >= 0 and free[near] and len(group) < self.group:
                    free[near] = False
                    group.append(near)
            (full if len(group) == self.group else rest).append(group)
        return np.array([row for group in [*full, *rest] for row in group])


def _hash(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A well-mixed number below 2**31 for every row (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) + np.uint64((seed * 1_000_003 + epoch + 1) % 2**63)
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(33)).astype(np.int64)
