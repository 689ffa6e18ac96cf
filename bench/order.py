"""How well the block shuffle mixes, against a perfect one.

  python -m bench.order [IMAGES [SHARD]]

Shards hold like samples together when a collection was not shuffled before it was sharded, and a
batch drawn from few shards is a list of like samples. Measured on IMAGES (default 113,287, COCO's)
in shards of SHARD samples (default 1,000), batches of 128 in 8 lanes: how many shards a batch draws
from; how often two samples of one shard meet, against a perfect shuffle; and how far two epochs
repeat each other's company.
"""

import sys
from types import SimpleNamespace

import numpy as np

from pipeline.training.sampler import SHUFFLE_BLOCK, Sampler

BATCH, LANES = 128, 8


def main(images: int, shard: int) -> None:
    sizes = np.array([shard] * (images // shard) + [images % shard] * bool(images % shard))
    starts = np.cumsum(sizes) - sizes
    split = SimpleNamespace(
        having=sizes[:, None],
        images_having=lambda shard, more_than: starts[shard] + np.arange(sizes[shard]),
        captions_of=lambda rows: (rows, np.ones(len(rows), int)),
    )
    order = Sampler(split, batch_size=BATCH, lanes=LANES, pairs="image", seed=0)
    epochs = [np.concatenate([r.reshape(1, -1) for r, _ in order.epoch(e)]) for e in (0, 1)]
    perfect = np.random.default_rng(0).permutation(images)[: epochs[0].size].reshape(-1, BATCH)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    print(f"{images:,} images, {len(sizes)} shards, blocks of {SHUFFLE_BLOCK:,} in {LANES} lanes")
    print(f"{'':<34}{'blocks':>9}{'perfect':>9}")
    for name, measure in (
        ("shards a batch draws from", drawn_from),
        ("pairs of one shard in a batch, %", met),
    ):
        found = [measure(shard_of[batches]) for batches in (epochs[0], perfect)]
        print(f"{name:<34}{found[0]:>9.2f}{found[1]:>9.2f}")
    again = [together_again(epochs[0], other, images) for other in (epochs[1], perfect)]
    print(f"{'pairs that meet in both epochs, %':<34}{again[0]:>9.3f}{again[1]:>9.3f}")


def drawn_from(shards_SB: np.ndarray) -> float:
    return float(np.mean([len(np.unique(row)) for row in shards_SB]))


def met(shards_SB: np.ndarray) -> float:
    same = [(np.bincount(row) * (np.bincount(row) - 1)).sum() for row in shards_SB]
    return 100 * float(np.mean(same)) / (BATCH * (BATCH - 1))


def together_again(first_SB: np.ndarray, second_SB: np.ndarray, images: int) -> float:
    """Percent of the pairs of a batch of the one epoch that share a batch of the other."""
    batch_of = np.full(images, -1)
    batch_of[second_SB.reshape(-1)] = np.repeat(np.arange(len(second_SB)), BATCH)
    pairs = 0
    for row in first_SB:
        there = batch_of[row]
        counts = np.bincount(there[there >= 0])
        pairs += (counts * (counts - 1)).sum()
    return 100 * pairs / (len(first_SB) * BATCH * (BATCH - 1))


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(*given, *(113_287, 1_000)[len(given) :])
