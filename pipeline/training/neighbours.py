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
        everyone: Captions | None = None  # not `Captions.read`, which keeps them
        for shard in shards:
            if parquet.finished(self.uris[shard], self._fingerprint(shard)) is None:
                everyone = everyone or Captions(parquet.read_tables(self.files.uris))
                near = self._search(shard, everyone)
                if not keep:
                    self._near[shard] = near
                    continue
                table = pa.table({"near": vector_column(near)})
                parquet.write_table(self.uris[shard], table, self._fingerprint(shard), {})

    def _fingerprint(self, shard: int) -> str:
        return store.fingerprint(KIND, self.files.version, self.files.names[shard], self.k)

    def _search(self, shard: int, everyone: Captions) -> np.ndarray:
        """(M, K) rows of the images nearest to those of a shard, the nearest first."""
        first, last = self.images.starts[shard], self.images.ends[shard]
        mine = slice(*np.searchsorted(everyone.image_of, [first, last]).tolist())
        image_N = torch.from_numpy(everyone.image_of)
        _, rows = nearest.anywhere(
            everyone.vectors[mine],
            everyone.vectors,
            self.k,
            query_group=image_N[mine] - int(first),
            candidate_group=image_N,
            query_owner=image_N[mine],
            candidate_owner=image_N,
        )
        return rows.numpy()

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
