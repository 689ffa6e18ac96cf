"""Which images have captions near to an image's own: searched once, kept beside the embeddings.

Legend of the shape suffixes: M images, K neighbours.
"""

import bisect
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch

from pipeline.labels.caption_vectors import Captions
from pipeline.retrieval import nearest
from pipeline.storage import mapped, parquet, store
from pipeline.storage.mapped import Rows
from pipeline.storage.run_folder import Files
from pipeline.storage.vector_columns import vector_column

FOLDER = "neighbours"  # in the embeddings' own
KIND = "neighbours-1"
TOGETHER = 50_000  # images that are searched for while all shards are read once


class Neighbours:
    """By image row: rows (K,) of the images nearest by their captions, -1 where there are no more.

    `files` are the embeddings of a split's shards and `images` says how many each has. A file a
    shard, `find` makes those that are missing; they are mapped from this machine's cache.
    """

    def __init__(self, files: Files, images: list[int], k: int, limit: float):
        self.files, self.images, self.k, self.limit = files, Rows(images), k, limit
        folder = store.join(files.folder, FOLDER)
        self.uris = [store.join(folder, f"{name}-{k}.parquet") for name in files.names]
        self._near: list[np.ndarray | None] = [None] * len(files)

    def find(self, shards: Iterable[int], keep: bool = True) -> None:
        """Search for the neighbours of the images of some shards, where that was not done.

        Without `keep` nothing is written, and what is found is held here.
        """
        missing = [s for s in shards if not parquet.finished(self.uris[s], self._fingerprint(s))]
        while missing:
            some, missing = self._together(missing)
            for shard, near in zip(some, self._search(some), strict=True):
                if not keep:
                    self._near[shard] = near
                    continue
                table = pa.table({"near": vector_column(near)})
                parquet.write_table(self.uris[shard], table, self._fingerprint(shard), {})

    def _together(self, shards: list[int]) -> tuple[list[int], list[int]]:
        """Those whose images are searched for at once, and the rest."""
        ends = np.cumsum(self.images.counts[shards])
        count = max(1, int(np.searchsorted(ends, TOGETHER, side="right")))
        return shards[:count], shards[count:]

    def _fingerprint(self, shard: int) -> str:
        return store.fingerprint(KIND, self.files.version, self.files.names[shard], self.k)

    def _search(self, shards: list[int]) -> list[np.ndarray]:
        """Of each shard rows (M, K) of the images nearest to its own, the nearest first.

        All shards are read one after the other, so what is held is these and one more.
        """
        mine = {
            s: Captions(parquet.read_tables(self.files.one(self.files.names[s]).uris))
            for s in shards
        }
        found = {
            s: (
                torch.full((len(c.image_ids), self.k), -torch.inf),
                torch.full((len(c.image_ids), self.k), -1),
            )
            for s, c in mine.items()
        }
        for number, first in enumerate(self.images.starts.tolist()):
            uris = self.files.one(self.files.names[number]).uris
            here = mine.get(number) or Captions(parquet.read_tables(uris))
            for shard, own in mine.items():
                found[shard] = _merged(found[shard], self._met(shard, own, here, first))
        return [rows.numpy().astype(np.int32) for _, rows in found.values()]

    def _met(self, shard: int, own: Captions, here: Captions, first: int):
        """Scores and rows (M, K) of the images of a block that are nearest to a shard's."""
        mine, theirs = torch.from_numpy(own.image_of), torch.from_numpy(here.image_of)
        scores, rows = nearest.anywhere(
            own.vectors,
            here.vectors,
            self.k,
            query_group=mine,
            candidate_group=theirs,
            query_owner=mine + int(self.images.starts[shard]),
            candidate_owner=theirs + first,
        )
        return scores, torch.where(rows < 0, rows, rows + first)

    def __getitem__(self, row: int) -> np.ndarray:
        shard = bisect.bisect_right(self.images.ends, row)
        if (near := self._near[shard]) is None:
            near = self._near[shard] = self._read(shard)
        return near[row - self.images.starts[shard]]

    def _read(self, shard: int) -> np.ndarray:
        uri = self.uris[shard]
        summary = parquet.finished(uri, self._fingerprint(shard))
        assert summary is not None  # `find` was called
        file = summary["files"][store.name_of(uri)]
        table = mapped.table(uri, file, self.limit, KIND, parquet.of_bytes)
        values = table["near"].chunk(0).flatten().to_numpy()
        return values.reshape(len(table), -1)


def _merged(found, more):
    """The best (M, K) of two lists each; of equal scores the earlier.

    Blocks come in the order of their rows, so of equal scores the lesser row is kept, as by one
    search of everything.
    """
    scores = torch.cat([found[0], more[0]], dim=1)
    best, order = scores.sort(dim=1, descending=True, stable=True)
    rows = torch.cat([found[1], more[1]], dim=1).gather(1, order)
    return best[:, : found[0].shape[1]], rows[:, : found[0].shape[1]]
