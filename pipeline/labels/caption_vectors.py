"""The caption vectors of a split, and the relevance that follows from them.

Legend of the shape suffixes: M images, C captions of an image, N captions, D width, P pairs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from pipeline.formulas.relevance import from_captions
from pipeline.labels import decisions
from pipeline.labels.maps import cosine_map
from pipeline.storage import mapped, parquet, store
from pipeline.storage.mapped import Rows
from pipeline.storage.piece_table import column
from pipeline.storage.run_folder import Files
from pipeline.storage.vector_columns import vector_matrix
from schemas.settings import LabelSettings

KIND = "vectors-1"  # of what is made of an embedding to be mapped


class PairVectors(NamedTuple):
    """The caption vectors of P pairs of an image and one of its captions."""

    images_PCD: torch.Tensor  # of all captions of a pair's image
    mask_PC: torch.Tensor  # those of them that are real
    texts_PD: torch.Tensor  # of the pair's own caption


class Captions:
    """The captions of a split, or of a shard, as unit vectors grouped by image, in shard order."""

    def __init__(self, table: pa.Table):
        self.caption_ids: list[str] = table["caption_id"].to_pylist()
        self.caption_image: list[str] = table["image_id"].to_pylist()
        vectors = torch.from_numpy(vector_matrix(table["vector"]))
        self.vectors = F.normalize(vectors, dim=1, out=vectors)  # float16 lost some of their length
        self.image_ids: list[str] = list(dict.fromkeys(self.caption_image))
        self.image_row = {image_id: row for row, image_id in enumerate(self.image_ids)}
        self.image_of = np.array([self.image_row[i] for i in self.caption_image], np.int64)
        starts = np.searchsorted(self.image_of, np.arange(len(self.image_ids) + 1))
        self.first, self.count = starts[:-1], np.diff(starts)
        self._decided: tuple | None = None  # the pairs that were looked up, and what was found

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def read(files: Files) -> "Captions":
        """Read once per process: their version tells apart what they held at other times."""
        return Captions(parquet.read_tables(files.uris))

    def rows_of(self, images: list[str]) -> np.ndarray:
        """Rows (M,) of images."""
        return np.array([self.image_row[i] for i in images], np.int64)

    def captions_of(self, images: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Caption rows (M, C) of M images, and a mask (M, C) of those that are real."""
        return self._captions_of_rows(self.rows_of(images))

    def _captions_of_rows(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        step = np.arange(self.count[rows].max(initial=1))
        real = step[None, :] < self.count[rows][:, None]
        return torch.from_numpy(self.first[rows][:, None] + step * real), torch.from_numpy(real)

    @functools.cached_property
    def single(self) -> bool:
        """Whether every image has one caption: then relevance is symmetric, but for decisions."""
        return int(self.count.max(initial=1)) == 1

    def images_of(self, caption_rows: np.ndarray) -> np.ndarray:
        """The image rows (P,) of captions (P,)."""
        return self.image_of[caption_rows]

    def of_pairs(self, caption_rows: torch.Tensor) -> PairVectors:
        """The vectors of P pairs, given by the row of the caption."""
        rows_PC, mask_PC = self._captions_of_rows(self.image_of[caption_rows.numpy()])
        return PairVectors(self.vectors[rows_PC], mask_PC, self.vectors[caption_rows])

    @functools.cached_property
    def means(self) -> torch.Tensor:
        """Mean caption (M, D) of every image: its product with a caption is the mean cosine."""
        sums = torch.zeros(len(self.image_ids), self.vectors.shape[1])
        sums.index_add_(0, torch.from_numpy(self.image_of), self.vectors)
        return sums / torch.from_numpy(self.count)[:, None]

    def relevance(self, images: list[str], settings: LabelSettings) -> torch.Tensor:
        """Relevance (M, N) of images to all the captions here, 1 to their own, or as decided."""
        rows_MC, mask_MC = self.captions_of(images)
        masks = {"mask_MC": mask_MC, "same_image_MN": self.same_image(images)}
        r_MN = relevance_of(self.vectors[rows_MC], self.vectors, settings, **masks)
        return self.decide(r_MN, self.rows_of(images), np.arange(len(self.caption_ids)), settings)

    def relevance_of_texts(self, rows: list[int], settings: LabelSettings) -> torch.Tensor:
        """Relevance (N, M) of N captions, given by row, to all the images here.

        A column of `relevance` for each: r is not symmetric.
        """
        rows_MC, mask_MC = self.captions_of(self.image_ids)
        own_N = torch.from_numpy(self.image_of[rows])
        same_image_MN = torch.arange(len(self.image_ids))[:, None] == own_N[None, :]
        masks = {"mask_MC": mask_MC, "same_image_MN": same_image_MN}
        r_MN = relevance_of(self.vectors[rows_MC], self.vectors[rows], settings, **masks)
        return self.decide(r_MN, np.arange(len(self.image_ids)), np.asarray(rows), settings).T

    def decide(self, r_MN, image_rows, caption_rows, settings: LabelSettings) -> torch.Tensor:
        """The relevance of images to captions (given by row) with people's decisions put in."""
        return _put_in(r_MN, image_rows, caption_rows, self.decided(settings))

    def decided(self, settings: LabelSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image row, caption row and relevance (P,) of the pairs here that people decided."""
        pairs = () if settings.overrides is None else decisions.overrides(settings.overrides)
        if self._decided is None or self._decided[0] is not pairs:
            caption_row = {caption_id: row for row, caption_id in enumerate(self.caption_ids)}
            here = [p for p in pairs if p.image_id in self.image_row]
            here = [p for p in here if p.caption_id in caption_row]
            images = np.array([self.image_row[p.image_id] for p in here], np.int64)
            captions = np.array([caption_row[p.caption_id] for p in here], np.int64)
            values = np.array([p.relevance for p in here], np.float32)
            self._decided = pairs, (images, captions, values)
        return self._decided[1]

    def same_image(self, images: list[str]) -> torch.Tensor:
        """True (M, N) where the caption was written for the image."""
        return torch.from_numpy(self.rows_of(images)[:, None] == self.image_of[None, :])

    def held_out(self, images: list[str], settings: LabelSettings) -> torch.Tensor:
        """Relevance of each caption to its own image's other captions (needs two of them)."""
        rows_MC, mask_MC = self.captions_of(images)
        vectors_MCD = self.vectors[rows_MC]
        cosine_MCC = vectors_MCD @ vectors_MCD.transpose(1, 2)
        other_MCC = mask_MC[:, None, :] & ~torch.eye(mask_MC.shape[1], dtype=torch.bool)
        if settings.reduce == "max":
            cosine_MC = cosine_MCC.masked_fill(~other_MCC, -torch.inf).amax(2)
        else:
            cosine_MC = cosine_MCC.masked_fill(~other_MCC, 0).sum(2) / other_MCC.sum(2)
        known_MC = mask_MC & (mask_MC.sum(1, keepdim=True) > 1)
        return cosine_map(settings)(cosine_MC[known_MC].clamp(-1, 1))


def _put_in(r_MN: torch.Tensor, image_rows, caption_rows, decided: tuple) -> torch.Tensor:
    image_P, caption_P, value_P = decided
    met = np.isin(image_P, image_rows) & np.isin(caption_P, caption_rows)
    for image, caption, value in zip(image_P[met], caption_P[met], value_P[met], strict=True):
        m, n = np.flatnonzero(image_rows == image), np.flatnonzero(caption_rows == caption)
        r_MN[torch.from_numpy(m)[:, None], torch.from_numpy(n)[None, :]] = float(value)
    return r_MN


class StoredCaptions:
    """The captions of a split as unit vectors by row, mapped while batches draw from their shard.

    Rows and numbers are those of `Captions`. `files` are the embeddings of the split's shards that
    hold something, with their entries, and `images` says how many each shard has.
    """

    def __init__(self, files: Files, images: Sequence[int], limit: float):
        self.entries, self.uris, self.limit = files.entries, files.uris, limit
        self.captions = Rows(column(files.entries, "captions"))
        self.images = Rows(images)
        self._decided: tuple | None = None  # the pairs that were looked up, and what was found

    def decide(self, r_MN, image_rows, caption_rows, settings: LabelSettings) -> torch.Tensor:
        """The relevance of images to captions (given by row) with people's decisions put in."""
        return _put_in(r_MN, image_rows, caption_rows, self.decided(settings))

    @property
    def single(self) -> bool:
        """Whether every image has one caption: then relevance is symmetric, but for decisions."""
        return len(self.captions) == len(self.images)  # no image is without one

    def images_of(self, caption_rows: np.ndarray) -> np.ndarray:
        """The image rows (P,) of captions (P,)."""
        return self._about(caption_rows)[2]

    def of_pairs(self, caption_rows: torch.Tensor) -> PairVectors:
        """The vectors of P pairs, given by the row of the caption."""
        first_P, count_P, _ = self._about(caption_rows.numpy())
        step = np.arange(count_P.max(initial=1))
        real_PC = step[None, :] < count_P[:, None]
        rows_PC = first_P[:, None] + step * real_PC
        both = self.vectors_of(np.concatenate([rows_PC.reshape(-1), caption_rows.numpy()]))
        images, texts = both.split([rows_PC.size, len(first_P)])
        return PairVectors(images.view(*rows_PC.shape, -1), torch.from_numpy(real_PC), texts)

    def of_images(self, image_rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors (M, C, D) of all captions of images (M,), and a mask (M, C) of real ones."""
        first_M, count_M = (np.empty(len(image_rows), np.int64) for _ in range(2))
        for shard, places, of_shard in self.images.by_shard(image_rows):
            image, count = (self._table(shard)[n].chunk(0).to_numpy() for n in ("image", "count"))
            begins = np.flatnonzero(np.diff(image, prepend=-1))[of_shard]
            first_M[places] = self.captions.starts[shard] + begins
            count_M[places] = count[begins]
        step = np.arange(count_M.max(initial=1))
        real_MC = step[None, :] < count_M[:, None]
        rows_MC = first_M[:, None] + step * real_MC
        vectors = self.vectors_of(rows_MC.reshape(-1))
        return vectors.view(*rows_MC.shape, vectors.shape[1]), torch.from_numpy(real_MC)

    def vectors_of(self, caption_rows: np.ndarray) -> torch.Tensor:
        """Unit vectors (P, D) float32 of captions (P,)."""
        width = self.entries[0]["dim"]
        out = np.empty((len(caption_rows), width), np.float16)
        for shard, places, of_shard in self.captions.by_shard(caption_rows):
            values = self._table(shard)["vector"].chunk(0).flatten().to_numpy()
            out[places] = values.reshape(-1, width)[of_shard]
        vectors = torch.from_numpy(out.astype(np.float32))
        return F.normalize(vectors, dim=1, out=vectors)  # float16 lost some of their length

    def _about(self, caption_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each caption's image (P,): its first caption's row, how many it has, its own row."""
        first, count, image = (np.empty(len(caption_rows), np.int64) for _ in range(3))
        for shard, places, of_shard in self.captions.by_shard(caption_rows):
            table = self._table(shard)
            here = (table[n].chunk(0).to_numpy()[of_shard] for n in ("first", "count", "image"))
            first[places], count[places], image[places] = here
            first[places] += self.captions.starts[shard]
            image[places] += self.images.starts[shard]
        return first, count, image

    def _table(self, shard: int) -> pa.Table:
        file = self.entries[shard]["files"][store.name_of(self.uris[shard])]
        return mapped.table(self.uris[shard], file, self.limit, KIND, _of_shard)

    def decided(self, settings: LabelSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image row, caption row and relevance (P,) of the pairs here that people decided.

        The ids of all shards are gone through, those of one at a time.
        """
        pairs = () if settings.overrides is None else decisions.overrides(settings.overrides)
        if self._decided is None or self._decided[0] is not pairs:
            names = {"image_id": "image", "caption_id": "caption"}
            wanted = {id_: pa.array([getattr(p, id_) for p in pairs], pa.string()) for id_ in names}
            rows: dict[str, dict[str, int]] = {id_: {} for id_ in names}
            for shard, uri in enumerate(self.uris if pairs else ()):
                table = parquet.read_columns(uri, list(names))
                places = {"caption_id": np.arange(len(table)), "image_id": _images(table)[0]}
                starts = {"caption_id": self.captions.starts, "image_id": self.images.starts}
                for id_ in names:
                    met = np.flatnonzero(pc.is_in(table[id_], wanted[id_]).to_numpy())
                    row = (starts[id_][shard] + places[id_][met]).tolist()
                    rows[id_] |= zip(table[id_].take(met).to_pylist(), row, strict=True)
            here = [p for p in pairs if p.image_id in rows["image_id"]]
            here = [p for p in here if p.caption_id in rows["caption_id"]]
            images = np.array([rows["image_id"][p.image_id] for p in here], np.int64)
            captions = np.array([rows["caption_id"][p.caption_id] for p in here], np.int64)
            values = np.array([p.relevance for p in here], np.float32)
            self._decided = pairs, (images, captions, values)
        return self._decided[1]


def _of_shard(data: bytes) -> pa.Table:
    """The vectors of a shard's captions, and of each caption's image which captions it has."""
    table = parquet.of_bytes(data)
    image, first = _images(table)
    count = np.diff([*first, len(table)])
    columns = {"image": image, "first": first[image], "count": count[image]}
    columns = {name: pa.array(values.astype(np.int32)) for name, values in columns.items()}
    return pa.table({"vector": table["vector"], **columns})


def _images(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The image (N,) that each caption of a shard is of, numbered, and each image's first (M,)."""
    ids = table["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    begins = np.concatenate([[True], ids[1:] != ids[:-1]])[: len(ids)]
    return np.cumsum(begins) - 1, np.flatnonzero(begins)


def relevance_of(
    image_captions_MCD: torch.Tensor, texts_ND: torch.Tensor, settings: LabelSettings, **masks
) -> torch.Tensor:
    """Relevance (M, N) of images, given by their captions, to texts, as the settings say.

    All vectors are unit vectors.
    """
    map, reduce = cosine_map(settings), settings.reduce
    return from_captions(image_captions_MCD, texts_ND, map=map, reduce=reduce, unit=True, **masks)
