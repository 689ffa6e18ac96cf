"""Scores of every image with every text."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from pipeline.retrieval import nearest, ranks
from pipeline.retrieval.ranks import Pairs, Ranks
from pipeline.sharding.exclusions import Excluded
from pipeline.storage import parquet
from pipeline.storage.vector_columns import vector_matrix

Matches = dict[str, dict[str, list[str]]]  # of i2t and t2i: a query's positives, by id


@dataclass(frozen=True)
class Gallery:
    """Images, captions and what a model scores their pairs with."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]
    vectors: tuple[torch.Tensor, torch.Tensor] | None = None  # (M, D), (N, D)
    matrix: torch.Tensor | None = None  # (M, N), where there are no vectors

    def places(self, i2t, t2i) -> tuple[Ranks, Ranks]:
        """Where positives stand, given rows (2, P) of queries and of their positives."""
        pairs = Pairs(*i2t), Pairs(*t2i)
        if self.vectors is None:
            return ranks.of_matrix(self.matrix, *pairs)
        return ranks.of_vectors(*self.vectors, *pairs)

    def scores(self, image_P: list[int], text_P: list[int]) -> torch.Tensor:
        """Scores (P,) of pairs of rows."""
        rows = torch.tensor(image_P), torch.tensor(text_P)
        if self.vectors is None:
            return self.matrix[rows]
        return nearest.products(*self.vectors, *rows)

    def rows(self, way: str) -> tuple[dict[str, int], dict[str, int]]:
        """Row of every query and of every candidate, by id."""
        sides = [{id_: n for n, id_ in enumerate(ids)} for ids in (self.image_ids, self.text_ids)]
        return (sides[0], sides[1]) if way == "i2t" else (sides[1], sides[0])

    def images_of(self, way: str, ids) -> np.ndarray:
        """The image that a query belongs to."""
        owner = dict(zip(self.text_ids, self.text_image_ids, strict=True))
        return np.array([owner[id_] for id_ in ids]) if way == "t2i" else np.array(ids)

    def own(self) -> Matches:
        """A caption's image, and an image's captions."""
        of_image: dict[str, list[str]] = {image_id: [] for image_id in self.image_ids}
        for text_id, image_id in zip(self.text_ids, self.text_image_ids, strict=True):
            of_image[image_id].append(text_id)
        of_text = {text: [image] for image, texts in of_image.items() for text in texts}
        return {"i2t": {image: texts for image, texts in of_image.items() if texts}, "t2i": of_text}

    def with_captions(self, count: int | None) -> tuple["Gallery", int]:
        """Only the first captions of every image, and how many were dropped."""
        if count is None:
            return self, 0
        seen: dict[str, int] = {}
        kept = []
        for row, image_id in enumerate(self.text_image_ids):
            seen[image_id] = seen.get(image_id, 0) + 1
            if seen[image_id] <= count:
                kept.append(row)
        dropped = len(self.text_ids) - len(kept)
        return (self.part(range(len(self.image_ids)), kept) if dropped else self), dropped

    def folds(self, count: int) -> list["Gallery"]:
        """The gallery cut by images in their order."""
        if count == 1:
            return [self]
        out = []
        for rows in np.array_split(np.arange(len(self.image_ids)), count):
            inside = {self.image_ids[row] for row in rows}
            texts = [n for n, image_id in enumerate(self.text_image_ids) if image_id in inside]
            out.append(self.part(rows, texts))
        return out

    def part(self, images, texts) -> "Gallery":
        images, texts = list(images), list(texts)
        ids = (
            [i[n] for n in rows] for i, rows in ((self.image_ids, images), (self.text_ids, texts))
        )
        owners = [self.text_image_ids[n] for n in texts]
        if self.vectors is None:
            return Gallery(*ids, owners, matrix=self.matrix[images][:, texts])
        return Gallery(*ids, owners, (self.vectors[0][images], self.vectors[1][texts]))

    def top(self, way: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (Q, K), falling, and rows (Q, K) of every query's best candidates."""
        if self.vectors is None:
            return nearest.largest(self.matrix if way == "i2t" else self.matrix.T, k)
        queries, candidates = self.vectors if way == "i2t" else self.vectors[::-1]
        return nearest.top_k(queries, candidates, k)


@dataclass(frozen=True)
class Vectors:
    """Tower vectors of one split: M images, N texts, in shard order."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]
    images: torch.Tensor  # (M, D)
    texts: torch.Tensor  # (N, D)

    @classmethod
    def of(cls, table: pa.Table) -> "Vectors":
        vectors = vector_matrix(table["vector"])
        is_image = np.array([m == "image" for m in table["modality"].to_pylist()], bool)
        ids = np.array(table["id"].to_pylist(), object)
        image_ids = np.array(table["image_id"].to_pylist(), object)
        return cls(
            ids[is_image].tolist(),
            ids[~is_image].tolist(),
            image_ids[~is_image].tolist(),
            torch.from_numpy(vectors[is_image]),
            torch.from_numpy(vectors[~is_image]),
        )

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def read(uris: tuple[str, ...], version: str) -> "Vectors":
        """Read once per process: `version` tells apart what the same files held at other times."""
        tables = [parquet.read_table(uri).replace_schema_metadata() for uri in uris]
        return Vectors.of(pa.concat_tables(tables))

    def head(self, images: int) -> "Vectors":
        """The first images and their texts."""
        kept = set(self.image_ids[:images])
        texts = [i for i, image_id in enumerate(self.text_image_ids) if image_id in kept]
        return Vectors(
            self.image_ids[:images],
            [self.text_ids[i] for i in texts],
            [self.text_image_ids[i] for i in texts],
            self.images[:images],
            self.texts[texts],
        )

    def staying(self, leaving: Excluded) -> tuple[list[int], list[int]]:
        """Rows of the images and of the texts that are not excluded."""
        images = [i for i, image_id in enumerate(self.image_ids) if image_id not in leaving.images]
        texts = [i for i, text_id in enumerate(self.text_ids) if text_id not in leaving.captions]
        return images, texts

    def without(self, leaving: Excluded) -> "Vectors":
        """The images and texts that are not excluded."""
        if not leaving.captions:
            return self
        images, texts = self.staying(leaving)
        return Vectors(
            [self.image_ids[i] for i in images],
            [self.text_ids[i] for i in texts],
            [self.text_image_ids[i] for i in texts],
            self.images[images],
            self.texts[texts],
        )

    def side(self, direction: str) -> tuple[list[str], list[str], torch.Tensor]:
        """Ids, image ids and vectors of a direction's queries."""
        if direction == "i2t":
            return self.image_ids, self.image_ids, self.images
        return self.text_ids, self.text_image_ids, self.texts


def other(direction: str) -> str:
    return {"i2t": "t2i", "t2i": "i2t"}[direction]


def scores(queries_QD, candidates_ND) -> torch.Tensor:
    """Cosines (Q, N), summed in float64, or rounding would undo ties."""
    return (queries_QD.double() @ candidates_ND.double().T).float()


def own(queries: list[str], candidates: list[str]) -> Pairs:
    """Rows of queries and of candidates of the same image, given both sides' image ids."""
    number = {image_id: n for n, image_id in enumerate(dict.fromkeys(candidates))}
    of_query = np.array([number.get(image_id, -1) for image_id in queries], np.int64)
    of_candidate = np.array([number[image_id] for image_id in candidates], np.int64)
    order = np.argsort(of_candidate, kind="stable")
    start = np.searchsorted(of_candidate[order], of_query)
    count = np.searchsorted(of_candidate[order], of_query, side="right") - start
    step = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    return Pairs(np.repeat(np.arange(len(queries)), count), order[np.repeat(start, count) + step])


@dataclass(frozen=True)
class Reranked(Gallery):
    """A gallery that has other scores where its texts ask: `matrix` is of i2t alone."""

    t2i: torch.Tensor | None = None  # (M, N)

    def places(self, i2t, t2i):
        pairs = Pairs(*i2t), Pairs(*t2i)
        found = [ranks.of_matrix(scores, *pairs) for scores in (self.matrix, self.t2i)]
        return found[0][0], found[1][1]

    def top(self, way: str, k: int):
        return Gallery.top(self if way == "i2t" else replace(self, matrix=self.t2i), way, k)

    def part(self, images, texts) -> "Reranked":
        images, texts = list(images), list(texts)
        t2i = replace(self, matrix=self.t2i)
        ours, theirs = (Gallery.part(gallery, images, texts) for gallery in (self, t2i))
        ids = ours.image_ids, ours.text_ids, ours.text_image_ids
        return Reranked(*ids, matrix=ours.matrix, t2i=theirs.matrix)
