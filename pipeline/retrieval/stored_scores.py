"""A split as a system whose vectors and ids lie in files of this machine, mapped.

Legend of the shape suffixes: M images, N texts, Q queries, K first candidates, D width.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from pipeline.retrieval.scores import Indices, Items, Rows, VectorScores
from pipeline.retrieval.stored import StoredVectors
from pipeline.sharding.exclusions import Excluded


class StoredItems(Items):
    """Images and texts in mapped tables (id; of texts the row of their image, too).

    Lists of all ids are made for who asks for them; `ids_at` reads those of some rows.
    """

    def __init__(self, images: pa.Table, texts: pa.Table):
        self.__dict__.update(images=_whole(images["id"]), texts=_whole(texts["id"]))
        self.__dict__["image_of_N"] = _whole(texts["image"]).to_numpy()

    @functools.cached_property
    def image_ids(self) -> list[str]:  # type: ignore[override]
        return self.__dict__["images"].to_pylist()

    @functools.cached_property
    def text_ids(self) -> list[str]:  # type: ignore[override]
        return self.__dict__["texts"].to_pylist()

    @functools.cached_property
    def text_image_ids(self) -> list[str]:  # type: ignore[override]
        return self.ids_at("image", self.image_of_N)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.__dict__["images"]), len(self.__dict__["texts"])

    def ids_at(self, side: str, rows: Indices) -> list[str]:
        return self.__dict__[f"{side}s"].take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def find(self, side: str, ids: Iterable[str]) -> dict[str, int]:
        wanted = pa.array(sorted(set(ids)), pa.large_string())
        met = pc.is_in(self.__dict__[f"{side}s"], wanted).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(met)
        return dict(zip(self.ids_at(side, rows), rows.tolist(), strict=True))

    def kept(self, excluded: Excluded) -> Rows:
        sides = (self.__dict__["images"], excluded.images), (self.__dict__["texts"], excluded[1])
        out = (pc.is_in(ids, pa.array(sorted(some), pa.large_string())) for ids, some in sides)
        images, texts = (np.flatnonzero(~gone.to_numpy(zero_copy_only=False)) for gone in out)
        return images, texts


@dataclass(frozen=True)
class StoredScores(VectorScores):
    """Inner products of stored vectors; the best are found among codes that were made once."""

    stored: tuple[StoredVectors, StoredVectors]  # of the images, of the texts

    @classmethod
    def of_files(cls, items: Items, images: StoredVectors, texts: StoredVectors) -> "StoredScores":
        return cls(items, images.vectors, texts.vectors, (images, texts))

    def top(self, direction: str, rows_Q: Indices, k: int) -> tuple[Tensor, Tensor]:
        queries, _ = self._sides(direction)
        return self.stored[direction == "i2t"].top_k(queries[rows_Q], k)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column of one chunk, or of none."""
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
