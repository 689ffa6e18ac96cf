"""Relevance lists of one direction: neighbours, their relevance, and what people decided.

Legend of the shape suffixes: Q queries, N candidates, K candidates of a query, P pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.labels.candidates import Block, Decided, Pairs
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import rescore
from pipeline.labels.maps import cosine_map
from pipeline.retrieval import cells, nearest
from pipeline.retrieval.streamed import Streamed
from pipeline.sharding import sidecar
from schemas.settings import EmbedSettings, LabelSettings


class Lists(NamedTuple):
    """Candidates of Q queries and their relevance; a place that is not taken has row -1."""

    relevance_QK: torch.Tensor
    row_QK: torch.Tensor


class Direction:
    """Queries of a shard, candidates of its split: i2t, t2i, i2i or t2t."""

    def __init__(self, name: str, mine: Captions, settings: LabelSettings, decided: Decided):
        self.name, self.mine, self.settings, self.decided = name, mine, settings, decided
        # More than are kept, since some of them may be put down.
        many = decided.most(name[0]) if self._is_judged else 0
        queries, group, owner = self._side(name[0], mine)
        by_image = "i" in name and settings.reduce == "max"
        groups = {"query_group": group, "query_owner": owner, "grouped": by_image}
        self.found = Streamed(queries, settings.top_k + many, **groups)
        self.keys: torch.Tensor | None = None  # of neighbours that were found elsewhere

    @property
    def query_ids(self) -> list[str]:
        return self.mine.image_ids if self.name[0] == "i" else self.mine.caption_ids

    @property
    def _is_judged(self) -> bool:
        return self.name in ("i2t", "t2i")  # decisions are of an image and a caption

    def add(self, block: Block, own: bool) -> None:
        """Meet the candidates of a block; `own`: of the queries' own shard."""
        vectors, group, owner = self._side(self.name[2], block.captions)
        group = np.arange(len(vectors)) if group is None else group
        first = block.first_image if self.name[2] == "i" else block.first_caption
        # The own image is in no other shard.
        self.found.add(vectors, group + first, owner if own else np.full(len(vectors), -1))

    def take(self, keys_NK: np.ndarray) -> None:
        """Take the neighbours that were found of every caption of mine, own image left out."""
        rows = self.mine.image_of if self.name[0] == "i" else np.arange(len(keys_NK))
        self.keys = cells.merged(keys_NK, rows, len(self.query_ids))

    def lists(self) -> Lists:
        """The nearest candidates of every query, own image left out."""
        known = self.keys is not None
        cosine_QK, row_QK = nearest.unpacked(self.keys) if known else self.found.result()
        place_P, _, _ = self._decided()
        k = self.settings.top_k + int(np.bincount(place_P).max(initial=0))
        relevance_QK = cosine_map(self.settings)(cosine_QK[:, :k].clamp(-1, 1))
        return Lists(relevance_QK, row_QK[:, :k])

    def _side(self, kind: str, captions: Captions) -> tuple:
        """Vectors, the query or candidate that each is of, and the image that each is of."""
        if kind == "t":
            return captions.vectors, None, captions.image_of
        if self.settings.reduce == "mean":  # a mean of cosines is the cosine of a mean
            return captions.means, None, np.arange(len(captions.image_ids))
        return captions.vectors, captions.image_of, captions.image_of

    def decide(self, lists: Lists) -> Lists:
        """The best `top_k` with people's decisions put in."""
        relevance_QK, row_QK = lists
        place_P, row_P, value_P = self._decided()
        if len(place_P):
            many = np.bincount(place_P).max()
            relevance_QK = torch.nn.functional.pad(relevance_QK, (0, many), value=-torch.inf)
            row_QK = torch.nn.functional.pad(row_QK, (0, many), value=-1)
        decided = zip(place_P.tolist(), row_P.tolist(), value_P.tolist(), strict=True)
        for place, row, value in decided:
            at = torch.nonzero(row_QK[place] == row)
            column = at[0, 0] if len(at) else torch.nonzero(row_QK[place] < 0)[0, 0]
            relevance_QK[place, column], row_QK[place, column] = value, row
        if len(place_P):
            relevance_QK = relevance_QK.masked_fill(row_QK < 0, -torch.inf)
            relevance_QK, order = relevance_QK.sort(dim=1, descending=True, stable=True)
            row_QK = row_QK.gather(1, order)
        return Lists(*(part[:, : self.settings.top_k] for part in (relevance_QK, row_QK)))

    def _decided(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, candidate and relevance (P,) of the pairs people decided, own images' left out."""
        pairs: Pairs = self.decided.pairs()
        others = (pairs.image_P != pairs.image_of_P) & self._is_judged
        rows = pairs.caption_P if self.name[0] == "i" else pairs.image_P
        place = {query_id: place for place, query_id in enumerate(self.query_ids)}
        asking = [pair[0 if self.name[0] == "i" else 1] for pair in pairs.ids]
        place_P = np.array([place.get(id_, -1) for id_ in asking], np.int64)
        known = (place_P >= 0) & others
        return place_P[known], rows[known], pairs.value_P[known]

    def read_again(
        self, lists: Lists, sidecars: Sequence[tuple[str, int, int]], own: int, embed: EmbedSettings
    ) -> Lists:
        """The lists with the relevance that a cross-encoder reads off the texts, in [0, 1].

        `sidecars` are of the split's shards, with the first caption's row and the first image's of
        each; `own` is that of the queries.
        """
        query_texts = _texts(self.name[0], sidecars[own][0])
        candidate_texts = self._texts_of(lists.row_QK, sidecars)
        query_P, place_P = torch.nonzero(lists.row_QK >= 0, as_tuple=True)
        texts, pair = [], []
        for number, (q, place) in enumerate(zip(query_P.tolist(), place_P.tolist(), strict=True)):
            candidate = candidate_texts[int(lists.row_QK[q, place])]
            texts += [(a, b) for a in query_texts[q] for b in candidate]
            pair += [number] * (len(query_texts[q]) * len(candidate))
        if not texts:
            return lists
        scores = torch.from_numpy(rescore(texts, self.settings.cross_encoder, embed))
        best = {"max": "amax", "mean": "mean"}[self.settings.reduce]
        relevance_P = torch.zeros(len(query_P)).scatter_reduce_(
            0, torch.tensor(pair), scores, best, include_self=False
        )
        relevance_QK = torch.full_like(lists.relevance_QK, -torch.inf)
        relevance_QK[query_P, place_P] = relevance_P
        return Lists(relevance_QK, lists.row_QK)

    def _texts_of(self, row_QK, sidecars: Sequence[tuple[str, int, int]]) -> dict[int, list[str]]:
        """The texts of the candidates in lists, by row; of a shard at a time."""
        wanted, out = np.unique(row_QK[row_QK >= 0].numpy()), {}
        starts = [images if self.name[2] == "i" else captions for _, captions, images in sidecars]
        ends = np.searchsorted(wanted, [*starts[1:], np.iinfo(np.int64).max])
        for (uri, *_), start, a, b in zip(sidecars, starts, [0, *ends], ends, strict=False):
            if a < b:
                texts = _texts(self.name[2], uri)
                out |= {int(row): texts[row - start] for row in wanted[a:b]}
        return out


def _texts(kind: str, uri: str) -> list[list[str]]:
    """The texts of every caption, or of every image, of a shard."""
    samples = sidecar.read_sidecar(uri, ["captions"])["captions"].to_pylist()
    texts = [[caption["text"] for caption in captions] for captions in samples]
    return texts if kind == "i" else [[text] for of_image in texts for text in of_image]
