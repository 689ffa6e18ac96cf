"""Which row goes where: the split of every row, then its place in a shard, from counts alone.

A task that knows how many rows of each split come before its own finds their places by arithmetic;
of train it reads a stretch of one permutation.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from schemas.settings import SourceSettings

SPLITS = ("train", "val", "test")
SHIFT = 32  # bits of a row's number within its shard
Positions = Callable[[int, int], np.ndarray]  # of the train rows from one number to another


def ordered(splits) -> list[str]:
    """Names of splits in the order in which their shards stand."""
    return [s for s in SPLITS if s in splits] + sorted(set(splits) - set(SPLITS))


# ---- splits ------------------------------------------------------------------------------------


def splits(manifest: pa.Table, settings: SourceSettings) -> dict[str, np.ndarray]:
    """Row numbers of each split, what is cut off train moved to val and test.

    The holdout is the end of train; a share is drawn by a hash of each image's id, so that an image
    stays where it is when others come.
    """
    given = counted(manifest)
    check_holdout(given, settings)
    order = of_rows(manifest, settings, settings.holdout)
    check_cuts(
        held(given, settings.holdout), Counter({s: len(n) for s, n in order.items()}), settings
    )
    return {split: order[split] for split in ordered(order)}


def counted(rows: pa.Table) -> Counter[str]:
    """How many rows say which split, in the order in which splits come."""
    found = pc.value_counts(rows["split"]).to_pylist()
    return Counter({count["values"]: count["counts"] for count in found})


def of_rows(rows: pa.Table, settings: SourceSettings, holdout: int) -> dict[str, np.ndarray]:
    """Numbers of the rows of each split; the last `holdout` of train are val."""
    found = pc.unique(rows["split"]).to_pylist()
    order = {s: np.flatnonzero(pc.equal(rows["split"], s).to_numpy()) for s in found}
    train = order.get("train", np.zeros(0, np.int64))
    if holdout:
        train, order["val"] = np.split(train, [len(train) - holdout])
        order["train"] = train
    if shares := _shares(settings):
        place = _places(rows["image_id"].take(pa.array(train)), settings.cut_seed)
        edges = [0.0, *itertools.accumulate(shares.values())]
        for split, (begin, end) in zip(shares, itertools.pairwise(edges), strict=True):
            order[split] = train[(place >= begin) & (place < end)]
        order["train"] = train[place >= edges[-1]]
    return order


def _shares(settings: SourceSettings) -> dict[str, float]:
    shares = {"val": settings.cut_val, "test": settings.cut_test}
    return {split: share for split, share in shares.items() if share}


def _places(ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each id, of its hash."""
    hashed = (
        hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest() for i in ids.to_pylist()
    )
    return np.frombuffer(b"".join(hashed), "<u8") / 2.0**64


def check_holdout(given: Counter[str], settings: SourceSettings) -> None:
    """Refuses a holdout that leaves no train image, and one beside a val split."""
    if settings.holdout and ("val" in given or settings.holdout >= given["train"]):
        raise InputError(
            f"source.holdout {settings.holdout} needs more than that many train images and no "
            f"val split of its own; found {dict(given)}"
        )


def held(given: Counter[str], holdout: int) -> Counter[str]:
    """How many rows each split has once the holdout is val."""
    if not holdout:
        return given
    moved = {"train": given["train"] - holdout, "val": holdout}
    return Counter({**given, **moved})


def check_cuts(before: Counter[str], cut: Counter[str], settings: SourceSettings) -> None:
    """Refuses shares that cannot be cut off: counts of each split before, and after."""
    shares = _shares(settings)
    for split, share in shares.items():
        if split in before:
            raise InputError(
                f"source.cut_{split} {share:g} makes a {split} split, and there is one of "
                f"{before[split]} images; leave it out, or drop the other by "
                f"source.splits.{split} drop"
            )
    if sum(shares.values()) >= 1:
        raise InputError("source.cut_val and source.cut_test together leave nothing of train")
    for split, share in shares.items():
        if not cut[split]:
            raise InputError(
                f"source.cut_{split} {share:g} of {before['train']} train images is none; give more"
            )


# ---- shards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The shards of a collection: how many rows are dealt out in each split, in what order."""

    sizes: dict[str, int]  # rows to be dealt out, by split
    samples: int  # of a shard
    seed: int
    numbers: dict[str, int] = field(default_factory=dict)  # of the first shard that is new

    @property
    def firsts(self) -> dict[str, int]:
        """The shards that stand before those of each split."""
        names = ordered({**self.sizes, **self.numbers})
        ends = itertools.accumulate(map(self._shards, names), initial=0)
        return dict(zip(names, ends, strict=False))

    def _shards(self, split: str) -> int:
        return self.numbers.get(split, 0) - (-self.sizes.get(split, 0) // self.samples)

    def __len__(self) -> int:
        """Shards of all splits."""
        return sum(map(self._shards, {**self.sizes, **self.numbers}))

    def names(self) -> list[tuple[str, str]]:
        """(split, name) of every shard, in order."""
        return [(s, f"{s}-{n:06d}") for s in self.firsts for n in range(self._shards(s))]

    def positions(self) -> np.ndarray:
        """Where each train row is packed: near neighbours on disk are not alike."""
        order = np.arange(self.sizes.get("train", 0))
        np.random.default_rng(self.seed).shuffle(order)  # what `permutation` gives, in place
        positions = np.empty_like(order)
        positions[order] = np.arange(len(order))
        return positions

    def known(self, split: str, shard_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
        """The places of rows of a split that are in a shard of a number already."""
        return ((self.firsts[split] + shard_N) << SHIFT) | row_N

    def places(
        self, rows: dict[str, np.ndarray], before: dict[str, int], positions: Positions
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, places): where each of the numbered rows of some splits is put.

        `before` says how many rows of a split stand before these. A place is a shard's number among
        all shards, shifted by `SHIFT`, and the row's number in it.
        """
        numbers, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for split, own in rows.items():
            start = before.get(split, 0)
            end = start + len(own)
            rank = positions(start, end) if split == "train" else np.arange(start, end)
            first = self.firsts[split] + self.numbers.get(split, 0)
            places.append(((first + rank // self.samples) << SHIFT) | rank % self.samples)
            numbers.append(own)
        return np.concatenate(numbers), np.concatenate(places)
