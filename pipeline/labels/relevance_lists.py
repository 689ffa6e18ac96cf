"""Relevance lists of one direction: neighbours, their relevance, and what people decided.

Legend of the shape suffixes: Q queries, N candidates, K candidates of a query, P pairs.
"""

from typing import NamedTuple

import numpy as np
import torch

from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import rescore
from pipeline.labels.maps import cosine_map
from pipeline.retrieval import approximate, nearest
from pipeline.sharding import sidecar
from schemas.settings import EmbedSettings, LabelSettings


class Lists(NamedTuple):
    """Candidates of Q queries and their relevance; a place that is not taken has row -1."""

    relevance_QK: torch.Tensor
    row_QK: torch.Tensor


class Direction:
    """Queries of a shard, candidates of its split: i2t, t2i, i2i or t2t."""

    def __init__(self, name: str, mine: Captions, everyone: Captions, settings: LabelSettings):
        self.name, self.mine, self.everyone, self.settings = name, mine, everyone, settings

    @property
    def query_ids(self) -> list[str]:
        return self.mine.image_ids if self.name[0] == "i" else self.mine.caption_ids

    def lists(self) -> tuple[Lists, float | None]:
        """The nearest candidates of every query, own image left out; the recall where not 1."""
        queries, query_group, query_owner = self._side(self.name[0], self.mine)
        candidates, group, owner = self._side(self.name[2], self.everyone)
        groups = {"query_group": query_group, "candidate_group": group}
        how = {**groups, "query_owner": query_owner, "candidate_owner": owner}
        place_P, _, _ = self._decided()
        k = self.settings.top_k + int(np.bincount(place_P).max(initial=0))  # some may be put down
        above = self.settings.approximate_above
        if above is None or len(self.everyone.caption_ids) <= above:
            cosine_QK, row_QK = nearest.anywhere(queries, candidates, k, **how)
            recall = None
        else:
            cosine_QK, row_QK = approximate.top_k(queries, candidates, k, **how)
            recall = approximate.recall(row_QK, queries, candidates, k, **how)
        relevance_QK = cosine_map(self.settings)(cosine_QK.clamp(-1, 1))
        return Lists(relevance_QK, row_QK), recall

    def _side(self, kind: str, captions: Captions) -> tuple:
        """Vectors, the query or candidate that each is of, and the split's row of its image."""
        owner = self.everyone.rows_of(captions.image_ids)
        if kind == "t":
            return captions.vectors, None, owner[captions.image_of]
        if self.settings.reduce == "mean":  # a mean of cosines is the cosine of a mean
            return captions.means, None, owner
        return captions.vectors, captions.image_of, owner[captions.image_of]

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
        image_P, caption_P, value_P = self.everyone.decided(self.settings)
        others = image_P != self.everyone.image_of[caption_P]
        if self.name in ("i2i", "t2t"):  # decisions are of an image and a caption
            others[:] = False
        image_P, caption_P, value_P = image_P[others], caption_P[others], value_P[others]
        ids = self.everyone.image_ids if self.name[0] == "i" else self.everyone.caption_ids
        rows = (image_P, caption_P) if self.name[0] == "i" else (caption_P, image_P)
        place = {query_id: place for place, query_id in enumerate(self.query_ids)}
        place_P = np.array([place.get(ids[row], -1) for row in rows[0]], np.int64)
        known = place_P >= 0
        return place_P[known], rows[1][known], value_P[known]

    def read_again(self, lists: Lists, sidecars: list[str], embed: EmbedSettings) -> Lists:
        """The lists with the relevance that a cross-encoder reads off the texts, in [0, 1]."""
        text_of: dict[str, str] = {}
        for uri in sidecars:
            for captions in sidecar.read_sidecar(uri, ["captions"])["captions"].to_pylist():
                text_of |= {caption["caption_id"]: caption["text"] for caption in captions}
        query_texts = _texts(self.name[0], self.mine, text_of)
        candidate_texts = _texts(self.name[2], self.everyone, text_of)
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


def _texts(kind: str, captions: Captions, text_of: dict[str, str]) -> list[list[str]]:
    """The texts of every caption, or of every image."""
    texts = [text_of[caption_id] for caption_id in captions.caption_ids]
    if kind == "t":
        return [[text] for text in texts]
    return [texts[a : a + n] for a, n in zip(captions.first, captions.count, strict=True)]
