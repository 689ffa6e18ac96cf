"""Which pairs a step sees: a function of seed, epoch and step."""

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.storage.mapped import Rows
from pipeline.training.data import Split
from pipeline.training.neighbours import Neighbours

SHUFFLE_BLOCK = 4096  # samples permuted together: the shards of a block are read as one stretch


def order_of(images: int, batch_size: int, lanes: int, group: int) -> int:
    """The version of the order of so many images; what was trained in another goes on otherwise.

    2 where a lane has several blocks: in 1 one generator went through all of them, and a step was
    found by drawing all before it.
    """
    share = batch_size // lanes // group
    return 2 if images // batch_size * share > SHUFFLE_BLOCK else 1


class Sampler:
    """Which pairs each step of an epoch sees.

    With `neighbours`, by image row the rows near to it and -1 where there are no more, images go
    through the epoch in groups of `group` that are near to each other, whichever shard they lie in.

    An epoch is a number of rounds; in a round every image is seen at most once, so two captions of
    one image never meet in a batch. With pairs="caption", round k shows the images that have more
    than k captions, each with another one of its captions. Only whole batches are made: up to
    batch_size - 1 images sit out a round, others in each.

    Of a round a permutation of the shards is in memory and of each lane the block it is in, so an
    epoch may be of any length and any step is found at once.
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
        neighbours: Neighbours | np.ndarray | None = None,
    ):
        self.split, self.batch_size, self.lanes, self.seed = split, batch_size, lanes, seed
        self.group, self.neighbours = group, neighbours
        rounds = split.having.shape[1] if pairs == "caption" else 1
        self.sizes = [int(split.having[:, k].sum()) for k in range(rounds)]
        self.steps = sum(size // batch_size for size in self.sizes)
        if not self.steps:
            raise InputError(
                f"{len(split)} train images do not fill one batch of {batch_size}; "
                "lower --train.batch_size"
            )

    @property
    def version(self) -> int:
        """Which order it is: a checkpoint of another one begins its epoch again."""
        return order_of(self.sizes[0], self.batch_size, self.lanes, self.group)

    def epoch(
        self, epoch: int, start: int = 0, lanes: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image rows, caption rows) of each step from `start`: (lanes, batch_size / lanes).

        Of some lanes alone, where those are given: no more is read than they need.
        """
        lanes = range(self.lanes) if lanes is None else lanes
        for number, size in enumerate(self.sizes):
            steps = size // self.batch_size
            if start < steps:
                yield from Round(self, epoch, number).steps(start, lanes)
            start = max(0, start - steps)


class Round:
    """One round of an epoch: every image with more than `number` captions, at most once.

    The shards follow one another in random order, all the round's images with them, from an image
    drawn at random on; each lane has an equal stretch of that, and shuffles it block by block.
    """

    def __init__(self, sampler: Sampler, epoch: int, number: int):
        self.sampler, self.split, self.number = sampler, sampler.split, number
        self.seeds = [sampler.seed, epoch, number]
        self.first = np.random.default_rng(self.seeds)  # goes on through the first blocks
        having = self.split.having[:, number]
        self.shards = self.first.permutation(len(having))
        self.images = Rows(having[self.shards])
        self.shift = self.first.integers(len(self.images))  # who sits out is drawn every round
        self.share = sampler.batch_size // sampler.lanes // sampler.group  # of a step, in groups
        self.length = len(self.images) // sampler.batch_size * self.share  # of a lane, in groups
        self.grouped: np.ndarray | None = None
        if sampler.group > 1:
            every = self._rows(np.arange(len(self.images)))
            self.grouped = self._in_groups(self.first.permutation(every))

    def steps(self, start: int, lanes: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image rows, caption rows), (lanes, batch_size / lanes) each, of the steps from `start`.

        A step that lies in two blocks is of the end of one and the beginning of the next.
        """
        number, skipped = divmod(start * self.share, SHUFFLE_BLOCK)
        held = np.empty((2, len(lanes), 0, self.sampler.group), np.int64)
        for block in range(number, -(-self.length // SHUFFLE_BLOCK)):
            held = np.concatenate([held, self._block(block, lanes)[:, :, skipped:]], axis=2)
            skipped = 0
            while held.shape[2] >= self.share:
                step, held = held[:, :, : self.share], held[:, :, self.share :]
                rows, captions = step.reshape(2, len(lanes), -1)
                yield rows, captions

    def _block(self, block: int, lanes: Sequence[int]) -> np.ndarray:
        """Image rows and caption rows (2, lanes, block, group) of the same block of some lanes."""
        rng = np.random.default_rng([*self.seeds, block]) if block else copy.deepcopy(self.first)
        begin = block * SHUFFLE_BLOCK
        drawn = []
        for lane in range(self.sampler.lanes):
            places = np.arange(begin, min(begin + SHUFFLE_BLOCK, self.length))
            places = (lane * self.length + places)[:, None] * self.sampler.group
            places = places + np.arange(self.sampler.group)
            rng.shuffle(places)
            drawn.append(places)
        rows = self._rows(np.stack([drawn[lane] for lane in lanes]))
        first, count = self.split.captions_of(rows.reshape(-1))
        # Every image goes through its captions from a start drawn per epoch.
        begun = _hash(rows.reshape(-1), self.sampler.seed, self.seeds[1])
        turn = (begun + self.number) % count
        return np.stack([rows, (first + turn).reshape(rows.shape)])

    def _rows(self, places: np.ndarray) -> np.ndarray:
        """The image rows at places of the round, the same shape."""
        if self.grouped is not None:
            return self.grouped[places]
        rows = np.empty(places.size, np.int64)
        turned = (places.reshape(-1) - self.shift) % len(self.images)
        for shard, where, of_shard in self.images.by_shard(turned):
            mine = self.split.images_having(int(self.shards[shard]), self.number)
            rows[where] = mine[of_shard]
        return rows.reshape(places.shape)

    def _in_groups(self, rows: np.ndarray) -> np.ndarray:
        """The rows again, first in groups of neighbours, then those whose group is not full.

        Whom one group takes is in no other, so all of the round is held: 17 bytes an image.
        """
        group, neighbours = self.sampler.group, self.sampler.neighbours
        assert neighbours is not None
        free = np.zeros(len(self.split), bool)
        free[rows] = True
        full, rest = [], []
        for row in rows:
            if not free[row]:
                continue
            free[row], found = False, [row]
            for near in neighbours[row]:
                if near >= 0 and free[near] and len(found) < group:
                    free[near] = False
                    found.append(near)
            (full if len(found) == group else rest).append(found)
        return np.array([row for found in [*full, *rest] for row in found])


def _hash(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A well-mixed number below 2**31 for every row (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) + np.uint64((seed * 1_000_003 + epoch + 1) % 2**63)
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(33)).astype(np.int64)
