"""What a frozen tower makes of a split: made once, kept, and taken from there in every epoch.

A tower gets this by being frozen (`model.tune_image: {mode: frozen}`); it has nothing to do for it.
One with a new projection on frozen weights is in two parts: `features(x) -> (B, F)`, what is
frozen, `head(features) -> (B, dim)`, what is trained, `forward` the second of the first, and
`new = ("project",)`, the names of the modules that the second part is made of. Then F numbers an
image are kept. Of any other tower all is frozen, and its (B, dim) are.

A file a shard, which any later training with the same weights and shards finds again; workers make
a share of the shards each. An input has one vector whoever makes it: batches are of one size, and
what fills a shard's last one up is thrown away.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.storage import mapped, parquet, store
from pipeline.storage.mapped import Rows
from pipeline.storage.run_folder import contents
from pipeline.storage.vector_columns import vector_column
from pipeline.training.data import Split
from pipeline.training.distributed import ProcessGroup

KIND = "frozen-1"
FOLDER = "frozen"  # among the models
TOGETHER = 64  # inputs that are encoded at a time
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class InOrder:
    """The images of some shards, one after the other, as a `Loader` takes an order.

    The last batch of each shard is filled up with its last image.
    """

    split: Split
    shards: tuple[int, ...]
    idle: int = 0  # more batches of the first shard's first images
    lanes: int = 1
    batch_size: int = TOGETHER
    seed: int = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        batches = [rows for shard in self.shards for rows in filled(self.split.images, shard)]
        batches += self.idle * [filled(self.split.images, 0)[0]]
        for rows in batches[start:]:
            yield rows[None], self.split.captions_of(rows)[0][None]


def filled(rows: Rows, shard: int) -> list[np.ndarray]:
    """The rows of a shard by TOGETHER, its last one again where they run out."""
    first, last = int(rows.starts[shard]), int(rows.ends[shard])
    starts = range(first, last, TOGETHER)
    return [np.minimum(np.arange(start, start + TOGETHER), last - 1) for start in starts]


class FrozenVectors:
    """By row the vectors (F,) float32 of a split's images, or of its captions.

    `side` is image or text, `of` all that they follow from beside the shards. They are mapped from
    this machine's cache, of which `limit` is all that it may take (bytes).
    """

    def __init__(self, split: Split, side: str, of: str, limit: float):
        self.split, self.side, self.limit = split, side, limit
        self.rows = split.images if side == "image" else split.texts_of_shards
        self.prints = [store.fingerprint(KIND, side, of, contents(e)) for e in split.shards]
        folder = store.join(split.models, FOLDER, f"{side}-{of}")
        self.uris = [store.join(folder, f"{entry['name']}.parquet") for entry in split.shards]
        self.summaries: list[dict | None] = [None] * len(self.uris)

    def look(self, world: ProcessGroup) -> list[int]:
        """The shards whose vectors are missing; every worker looks at a share."""
        mine = range(world.rank, len(self.uris), world.size)
        for shard in mine:
            self.summaries[shard] = parquet.finished(self.uris[shard], self.prints[shard])
        self._tell(world)
        return [shard for shard, found in enumerate(self.summaries) if found is None]

    def make(
        self,
        missing: Sequence[int],
        vectors_of: Callable[[tuple[int, ...]], Iterator[torch.Tensor]],
        world: ProcessGroup,
    ) -> None:
        """Make the vectors of the missing shards. Every worker calls it, and makes a share.

        `vectors_of(shards)` gives (TOGETHER, F) of every batch of `filled`, shard after shard. What
        was made of a shard is kept when it is whole, so another try goes on from there.
        """
        mine, started = tuple(missing[world.rank :: world.size]), time.perf_counter()
        given = vectors_of(mine)
        for shard in mine:
            count = int(self.rows.counts[shard])
            parts = [next(given).float().cpu().numpy() for _ in filled(self.rows, shard)]
            table = pa.table({"vector": vector_column(np.concatenate(parts)[:count])})
            summary = {"vectors": count, "dim": table["vector"].type.list_size}
            uri, print_ = self.uris[shard], self.prints[shard]
            self.summaries[shard] = parquet.write_table(uri, table, print_, summary)
        for _ in given:  # what a worker does so that others can do their work
            pass
        self._tell(world)
        if world.rank == 0:
            LOG.info(
                "the %s tower is frozen: its vectors of %s inputs were made once, in %.0f s, and "
                "every epoch takes them from %s (train.frozen_vectors off: made anew each time)",
                *(self.side, f"{int(self.rows.counts[list(missing)].sum()):,}"),
                *(time.perf_counter() - started, self.uris[0].rpartition("/")[0]),
            )

    def _tell(self, world: ProcessGroup) -> None:
        """What one worker knows all know."""
        for known in world.gather_objects(dict(enumerate(self.summaries))):
            for shard, summary in known.items():
                self.summaries[shard] = self.summaries[shard] or summary

    @property
    def width(self) -> int:
        summary = self.summaries[0]
        assert summary is not None
        return int(summary["dim"])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(n, F) of rows (n,)."""
        out = np.empty((len(rows), self.width), np.float32)
        for shard, places, of_shard in self.rows.by_shard(rows):
            out[places] = self._read(shard)[of_shard]
        return out

    def _read(self, shard: int) -> np.ndarray:
        uri, summary = self.uris[shard], self.summaries[shard]
        assert summary is not None
        file = summary["files"][store.name_of(uri)]
        table = mapped.table(uri, file, self.limit, KIND, parquet.of_bytes)
        return table["vector"].chunk(0).flatten().to_numpy().reshape(len(table), -1)


class VectorSplit(Split):
    """A split whose images are what a frozen tower made of them: none is decoded."""

    def __init__(self, split: Split, vectors: FrozenVectors):
        self.__dict__.update(vars(split))
        self.vectors = vectors

    def image(self, row: int) -> np.ndarray:
        """(F,) float32 of a row."""
        return self.vectors.take(np.array([row]))[0]
