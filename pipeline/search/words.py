"""Which captions have a word: lists of captions by term, a file a shard, made once a machine.

A word is found whole, as `models.words.terms` has it; one of several terms, such as `e-mail` or one
of Chinese, where they stand together.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.models.words import terms
from pipeline.reports.pictures import Pictures
from pipeline.storage import mapped

KIND = "terms-1"  # of a shard's lists; another number, made in another way
KEPT = 32  # words whose captions are kept: 4 bytes each


class Words:
    """The captions of a split by their words."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures
        self.rows_with = functools.lru_cache(maxsize=KEPT)(self._rows_with)

    def asked(self, words: str) -> list[str]:
        """The words of a filter that hold a term."""
        return list(dict.fromkeys(word for word in words.split() if terms(word)))

    def captions_with(self, words: list[str], without: list[str]) -> np.ndarray:
        """Whether each caption (N,) has all of some words and none of others."""
        kept = np.ones(len(self.pictures.captions), bool)
        for word in words:
            kept &= self._mask([word])
        return kept & ~self._mask(without) if without else kept

    def images_with(
        self, words: list[str], without: list[str], image_of_N: np.ndarray
    ) -> np.ndarray:
        """Whether each image (M,) has a caption with all of some words, and none with others."""
        left = self._images(self.captions_with(words, []), image_of_N)
        return left & ~self._images(self._mask(without), image_of_N) if without else left

    def _images(self, captions: np.ndarray, image_of_N: np.ndarray) -> np.ndarray:
        met = np.zeros(len(self.pictures.images), bool)
        met[image_of_N[captions]] = True
        return met

    def _mask(self, words: list[str]) -> np.ndarray:
        """Whether each caption (N,) has any of the words."""
        met = np.zeros(len(self.pictures.captions), bool)
        for word in words:
            met[self.rows_with(word)] = True
        return met

    def _rows_with(self, word: str) -> np.ndarray:
        """The captions that a word is in, by row."""
        asked, found = terms(word), []
        for shard, start in enumerate(self.pictures.captions.starts.tolist()):
            table = self._table(shard)
            places = [pc.index(table["term"], term).as_py() for term in dict.fromkeys(asked)]
            if min(places) < 0:
                continue
            lists = [table["rows"][place].values.to_numpy() for place in places]
            rows = functools.reduce(np.intersect1d, lists)
            if len(asked) > 1:
                rows = rows[self._together(shard, rows, asked)]
            found.append(start + rows)
        return np.concatenate(found).astype(np.int32) if found else np.zeros(0, np.int32)

    def _together(self, shard: int, rows: np.ndarray, asked: list[str]) -> np.ndarray:
        """In which of some captions the terms stand together, in this order."""
        captions = self.pictures.table(shard)["captions"].chunk(0).flatten().field("text")
        texts = captions.take(pa.array(rows)).to_pylist()
        return np.array([_spaced(asked) in _spaced(terms(text)) for text in texts], bool)

    def _table(self, shard: int) -> pa.Table:
        """The terms of a shard's captions, and of each the captions that have it."""
        entry = self.pictures.entries[shard]
        file = entry["files"][f"{entry['name']}.parquet"]

        def made() -> pa.Table:
            texts = self.pictures.table(shard)["captions"].chunk(0).flatten().field("text")
            return _lists(texts.to_pylist())

        return mapped.kept_open(file, self.pictures.limit, KIND, made)


def _spaced(words: list[str]) -> str:
    return f" {' '.join(words)} "


def _lists(texts: list[str]) -> pa.Table:
    """Every term (T,) and the texts that have it, by row, rising."""
    number: dict[str, int] = {}
    pairs = [
        (number.setdefault(term, len(number)), row)
        for row, text in enumerate(texts)
        for term in set(terms(text))
    ]
    term_P, row_P = np.array(pairs, np.int32).reshape(-1, 2).T
    rows = pa.array(row_P[np.argsort(term_P, kind="stable")])
    ends = np.bincount(term_P, minlength=len(number)).cumsum()
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    lists = pa.ListArray.from_arrays(offsets, rows)
    return pa.table({"term": pa.array(list(number), pa.string()), "rows": lists})
