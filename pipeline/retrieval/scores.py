"""Who is compared, and any system's scores of every image with every text.

A system is its vectors (`VectorScores`), its matrices (`MatrixScores`), or a function that makes
scores when they are asked for (`BlockScores`). Whoever ranks, measures or searches takes any.

Legend of the shape suffixes: M images, N texts or candidates, D width, Q queries, K first
candidates, P pairs of a query and a candidate.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.retrieval import nearest
from pipeline.retrieval import ranks as counting
from pipeline.retrieval.ranks import Pairs, Ranks
from pipeline.sharding.exclusions import Excluded
from pipeline.storage.vector_columns import vector_matrix

DIRECTIONS = ("i2t", "t2i")
SIDES = {"i2t": ("image", "text"), "t2i": ("text", "image")}  # who asks, and who is ranked
NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
DOUBLED = 2**16  # candidates in float64 at a time
BLOCK = 256  # queries of which scores are made at a time

Matches = dict[str, dict[str, list[str]]]  # of i2t and t2i: a query's positives, by id
Indices = np.ndarray | Sequence[int]  # rows of one side
Rows = tuple[np.ndarray, np.ndarray]  # of images and of texts


def other(direction: str) -> str:
    """The direction in which the candidates ask."""
    return "t2i" if direction == "i2t" else "i2t"


@dataclass(frozen=True)
class Items:
    """M images and N texts by id, in shard order, and the image that each text belongs to."""

    image_ids: list[str]
    text_ids: list[str]
    text_image_ids: list[str]

    @property
    def counts(self) -> tuple[int, int]:
        """How many images there are, and how many texts."""
        return len(self.image_ids), len(self.text_ids)

    def ids_at(self, side: str, rows: Indices) -> list[str]:
        """Ids of some images ("image") or texts ("text"), by row."""
        ids = self.image_ids if side == "image" else self.text_ids
        return [ids[row] for row in rows]

    def find(self, side: str, ids: Iterable[str]) -> dict[str, int]:
        """The rows of those of the ids that are here."""
        wanted, here = set(ids), self.image_ids if side == "image" else self.text_ids
        return {id_: row for row, id_ in enumerate(here) if id_ in wanted}

    @functools.cached_property
    def image_of_N(self) -> np.ndarray:
        """The row of each text's image."""
        row = {image_id: n for n, image_id in enumerate(self.image_ids)}
        if lost := next((i for i in self.text_image_ids if i not in row), None):
            raise InputError(f"texts belong to image {lost!r}, which is not among the images")
        return np.array([row[image_id] for image_id in self.text_image_ids], np.int64)

    def ids(self, direction: str) -> tuple[list[str], list[str]]:
        """Ids of a direction's queries and of its candidates."""
        sides = self.image_ids, self.text_ids
        return sides if direction == "i2t" else sides[::-1]

    def rows(self, direction: str) -> tuple[dict[str, int], dict[str, int]]:
        """Row of every query and of every candidate, by id."""
        queries, candidates = ({id_: n for n, id_ in enumerate(s)} for s in self.ids(direction))
        return queries, candidates

    def images_of(self, direction: str, query_ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Ids of the images that queries belong to: an image's own, a text's image."""
        if direction == "i2t":
            return np.array(query_ids)
        owner = dict(zip(self.text_ids, self.text_image_ids, strict=True))
        return np.array([owner[id_] for id_ in query_ids])

    def positives(self, direction: str, rows_Q: Indices) -> Pairs:
        """Queries, by their place in `rows_Q`, and the candidates of the same image, by row."""
        of_images, of_texts = np.arange(self.counts[0]), self.image_of_N
        sides = (of_images, of_texts) if direction == "i2t" else (of_texts, of_images)
        of_query, of_candidate = sides[0][rows_Q], sides[1]
        # Candidates sorted by image: those of a query's image stand together, from `start` on.
        order = np.argsort(of_candidate, kind="stable")
        start = np.searchsorted(of_candidate[order], of_query)
        count = np.searchsorted(of_candidate[order], of_query, side="right") - start
        # Every query as often as it has positives, which are numbered from 0 for each.
        step = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        query_P = np.repeat(np.arange(len(of_query)), count)
        return Pairs(query_P, order[np.repeat(start, count) + step])

    def matches(self) -> Matches:
        """A caption's image, and an image's captions, by id."""
        captions: dict[str, list[str]] = {image_id: [] for image_id in self.image_ids}
        for text_id, image in zip(self.text_ids, self.image_of_N.tolist(), strict=True):
            captions[self.image_ids[image]].append(text_id)
        of_text = {text: [image] for image, texts in captions.items() for text in texts}
        return {"i2t": {image: texts for image, texts in captions.items() if texts}, "t2i": of_text}

    def take(self, images: Indices, texts: Indices) -> "Items":
        """Some rows of each side."""
        owners = self.ids_at("image", self.image_of_N[np.asarray(texts, np.int64)])
        return Items(self.ids_at("image", images), self.ids_at("text", texts), owners)

    def of_images(self, images: Indices) -> Rows:
        """Rows of some images and of all their texts."""
        return np.asarray(images), np.flatnonzero(np.isin(self.image_of_N, images))

    def first_captions(self, count: int | None) -> Rows:
        """All images, and the first captions of each."""
        images, texts = (np.arange(of) for of in self.counts)
        if count is None:
            return images, texts
        pairs = self.positives("i2t", images)
        each = np.bincount(pairs.query_P, minlength=len(images))
        place = np.arange(len(pairs.query_P)) - np.repeat(each.cumsum() - each, each)
        return images, np.sort(pairs.candidate_P[place < count])

    def folds(self, count: int) -> list[Rows]:
        """The images cut into so many parts in their order, each with its texts."""
        return [self.of_images(part) for part in np.array_split(range(self.counts[0]), count)]

    def kept(self, excluded: Excluded) -> Rows:
        """Rows of the images and of the texts that are not excluded."""
        sides = (self.image_ids, excluded.images), (self.text_ids, excluded.captions)
        images, texts = ([n for n, id_ in enumerate(ids) if id_ not in out] for ids, out in sides)
        return np.array(images, np.int64), np.array(texts, np.int64)


class Scores(Protocol):
    """Scores that queries can be ranked by, a direction at a time."""

    @property
    def items(self) -> Items:
        """Who is compared."""

    @property
    def together(self) -> int | None:
        """How many queries are best asked about together; None: any number."""

    def block(self, direction: str, rows_Q: Indices) -> Tensor:
        """Scores (Q, N) of queries, by row, with all candidates."""

    def top(self, direction: str, rows_Q: Indices, k: int) -> tuple[Tensor, Tensor]:
        """Scores (Q, K), falling, and rows (Q, K) of every query's best candidates."""

    def ranks(self, direction: str, rows_Q: Indices, pairs: Pairs) -> Ranks:
        """Where positives stand, of queries by their place in `rows_Q`."""


class System(Scores, Protocol):
    """Scores that can be cut and measured as a whole."""

    def ranks_of_both(self, i2t: Pairs, t2i: Pairs) -> tuple[Ranks, Ranks]:
        """Where the positives of both directions stand, in one pass."""

    def of_pairs(self, image_P: Indices, text_P: Indices) -> Tensor:
        """Scores (P,) of pairs of rows."""

    def take(self, images: Indices, texts: Indices) -> "System":
        """Some rows of each side."""


@dataclass(frozen=True)
class VectorScores:
    """Inner products of vectors, which are never multiplied out: (M, D) and (N, D)."""

    items: Items
    images: Tensor
    texts: Tensor
    together = None

    @classmethod
    def of(cls, table: pa.Table) -> "VectorScores":
        """Of a table with the columns id, image_id, modality (image, text) and vector."""
        vectors = vector_matrix(table["vector"])
        is_image = np.array([m == "image" for m in table["modality"].to_pylist()], bool)
        ids = np.array(table["id"].to_pylist(), object)
        image_ids = np.array(table["image_id"].to_pylist(), object)
        parts = ids[is_image], ids[~is_image], image_ids[~is_image]
        return cls(
            Items(*(part.tolist() for part in parts)),
            torch.from_numpy(vectors[is_image]),
            torch.from_numpy(vectors[~is_image]),
        )

    def _sides(self, direction: str) -> tuple[Tensor, Tensor]:
        return (self.images, self.texts) if direction == "i2t" else (self.texts, self.images)

    def block(self, direction: str, rows_Q: Indices) -> Tensor:
        queries, candidates = self._sides(direction)
        # Summed in float64, or rounding would undo ties.
        asked, parts = queries[rows_Q].double(), candidates.split(DOUBLED)
        return torch.cat([(asked @ part.double().T).float() for part in parts], dim=1)

    def top(self, direction: str, rows_Q: Indices, k: int) -> tuple[Tensor, Tensor]:
        queries, candidates = self._sides(direction)
        return nearest.top_k(queries[rows_Q], candidates, k)

    def ranks(self, direction: str, rows_Q: Indices, pairs: Pairs) -> Ranks:
        queries, candidates = self._sides(direction)
        return counting.of_vectors(queries[rows_Q], candidates, pairs, NONE)[0]

    def ranks_of_both(self, i2t: Pairs, t2i: Pairs) -> tuple[Ranks, Ranks]:
        return counting.of_vectors(self.images, self.texts, i2t, t2i)

    def of_pairs(self, image_P: Indices, text_P: Indices) -> Tensor:
        rows = torch.as_tensor(image_P), torch.as_tensor(text_P)
        return nearest.products(self.images, self.texts, *rows)

    def take(self, images: Indices, texts: Indices) -> "VectorScores":
        return VectorScores(self.items.take(images, texts), self.images[images], self.texts[texts])


@dataclass(frozen=True)
class MatrixScores:
    """Matrices (M, N) of scores: where texts ask there may be others than where images do."""

    items: Items
    i2t: Tensor
    t2i: Tensor
    together = None

    def block(self, direction: str, rows_Q: Indices) -> Tensor:
        return self.i2t[rows_Q] if direction == "i2t" else self.t2i.T[rows_Q]

    def top(self, direction: str, rows_Q: Indices, k: int) -> tuple[Tensor, Tensor]:
        return nearest.largest(self.block(direction, rows_Q), k)

    def ranks(self, direction: str, rows_Q: Indices, pairs: Pairs) -> Ranks:
        return counting.of_matrix(self.block(direction, rows_Q), pairs, NONE)[0]

    def ranks_of_both(self, i2t: Pairs, t2i: Pairs) -> tuple[Ranks, Ranks]:
        if self.i2t is self.t2i:
            return counting.of_matrix(self.i2t, i2t, t2i)
        return counting.of_matrix(self.i2t, i2t, NONE)[0], counting.of_matrix(self.t2i, NONE, t2i)[
            1
        ]

    def of_pairs(self, image_P: Indices, text_P: Indices) -> Tensor:
        return self.i2t[torch.as_tensor(image_P), torch.as_tensor(text_P)]

    def take(self, images: Indices, texts: Indices) -> "MatrixScores":
        i2t = self.i2t[images][:, texts]
        t2i = i2t if self.t2i is self.i2t else self.t2i[images][:, texts]
        return MatrixScores(self.items.take(images, texts), i2t, t2i)


class BlockScores:
    """Scores that `make(direction, rows_Q) -> (Q, N)` makes; the last ones made are kept."""

    together = BLOCK

    def __init__(self, items: Items, make: Callable[[str, Tensor], Tensor]):
        self.items, self.make = items, make
        self._last: tuple[str, Tensor, Tensor] = "", torch.empty(0), torch.empty(0)

    def block(self, direction: str, rows_Q: Indices) -> Tensor:
        asked_Q = torch.as_tensor(rows_Q)
        known, known_Q, scores_QN = self._last
        if known == direction and torch.isin(asked_Q, known_Q).all():
            order = known_Q.argsort()
            return scores_QN[order[torch.searchsorted(known_Q[order], asked_Q)]]
        scores_QN = self.make(direction, asked_Q)
        self._last = direction, asked_Q, scores_QN
        return scores_QN

    def top(self, direction: str, rows_Q: Indices, k: int) -> tuple[Tensor, Tensor]:
        return nearest.largest(self.block(direction, rows_Q), k)

    def ranks(self, direction: str, rows_Q: Indices, pairs: Pairs) -> Ranks:
        return counting.of_matrix(self.block(direction, rows_Q), pairs, NONE)[0]


def matrix_scores(items: Items, matrix: Tensor) -> MatrixScores:
    """One matrix (M, N) for both directions."""
    return MatrixScores(items, matrix, matrix)
