"""Who asks, who is ranked, and who else may be looked at: the pools of a re-ranking.

*Inductive*: a query is alone. Besides it there are the gallery it is ranked against and a bank of
train items of its own kind. *Transductive*: the other queries are the bank. A caption is asked then
among captions of its own number in their images, one an image: its siblings are left out, and no
image has more captions in the pool than another, which would tell the right one.

Legend of the shape suffixes: Q queries, N gallery, P pool.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from pipeline.errors import InputError
from pipeline.reranking.similarities import Similarities, Towers
from pipeline.retrieval.scores import SIDES, VectorScores

Pool = Literal["inductive", "transductive"]
CELLS, ROWS = 2**22, 512  # scores, and queries, held at a time


@dataclass(frozen=True)
class Problem:
    """A collection to be re-ranked: the similarities, and which rows play which part."""

    sims: Similarities
    gallery: dict[str, torch.Tensor]  # rows of each side that are queries, and are ranked
    bank: dict[str, torch.Tensor]  # rows of each side from the train split
    owner: dict[str, torch.Tensor]  # number of its image, for every row of each side
    pool: Pool = "inductive"
    siblings: bool = False  # transductive: whether a caption meets the others of its image

    def to(self, device) -> "Problem":
        """The problem with all its tensors on a device."""
        gallery, bank, owner = (
            {side: rows.to(device) for side, rows in part.items()}
            for part in (self.gallery, self.bank, self.owner)
        )
        return replace(self, sims=self.sims.to(device), gallery=gallery, bank=bank, owner=owner)

    def views(self, direction: str) -> Iterator["View"]:
        """The parts of a direction's queries that have one pool; together they are the gallery."""
        asking, ranked = SIDES[direction]
        queries = self.gallery[asking]
        if self.pool == "inductive":
            if not len(self.bank[asking]):
                raise InputError(
                    f"no {asking}s of the train split to re-rank {direction} with; take "
                    "rerank.pool transductive, or a run with a train split"
                )
            parts = [(queries, self.bank[asking])]
        elif self.siblings or asking == "image":
            parts = [(queries, queries)]
        else:
            number = numbers(self.owner[asking][queries])
            parts = [(queries[number == n],) * 2 for n in number.unique().tolist()]
        for rows, pool in parts:
            yield View(self, direction, asking, ranked, rows, self.gallery[ranked], pool)


def numbers(owner_N: torch.Tensor) -> torch.Tensor:
    """The number (N,), from 0, of each text among those of its image."""
    order = torch.argsort(owner_N, stable=True)
    _, counts = torch.unique_consecutive(owner_N[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=order.device) - starts
    return number


@dataclass(frozen=True)
class View:
    """Queries of one direction with one gallery and one pool, and their scores so far."""

    problem: Problem
    direction: str
    asking: str  # the side of queries and pool
    ranked: str  # the side of the gallery
    queries_Q: torch.Tensor
    gallery_N: torch.Tensor
    pool_P: torch.Tensor
    scored: Callable[["View", torch.Tensor], torch.Tensor] | None = None
    known: dict[Any, Any] = field(default_factory=dict, repr=False)
    recent: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def sims(self) -> Similarities:
        return self.problem.sims

    @property
    def inductive(self) -> bool:
        return self.problem.pool == "inductive"

    def scores(self, rows_Q: torch.Tensor) -> torch.Tensor:
        """Scores (Q, N) of queries or pool items against the gallery, by the methods so far."""

        def make() -> torch.Tensor:
            if self.scored is not None:
                return self.scored(self, rows_Q)
            return self.sims.between(self.asking, rows_Q, self.ranked, self.gallery_N)

        return self.lately(rows_Q, "scores", make)

    def after(self, method: Callable[..., torch.Tensor], **setting) -> "View":
        """The view whose scores are the method's, made of this one's."""
        return replace(
            self, scored=lambda _, rows_Q: method(self, rows_Q, **setting), known={}, recent={}
        )

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made the first time it is asked for under this key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def lately(self, rows_Q: torch.Tensor, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept until other rows are asked about."""
        if self.recent.get("rows") is not rows_Q:
            self.recent.clear()
            self.recent["rows"] = rows_Q
        if key not in self.recent:
            self.recent[key] = make()
        return self.recent[key]

    def parts(self, rows_Q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows in parts whose scores against the gallery are held at a time."""
        return rows_Q.split(max(1, min(ROWS, CELLS // max(1, len(self.gallery_N)))))

    def positives(self, rows_Q: torch.Tensor) -> torch.Tensor:
        """True (Q, N) where query and candidate belong to one image."""
        owner = self.problem.owner
        return owner[self.asking][rows_Q][:, None] == owner[self.ranked][self.gallery_N][None, :]

    def nearest_in_pool(self, rows_Q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarities and rows (Q, K) of each query's nearest in the pool, without itself."""
        values_QP = self.sims.between(self.asking, rows_Q, self.asking, self.pool_P)
        if not self.inductive:
            values_QP = values_QP.masked_fill(rows_Q[:, None] == self.pool_P[None, :], -torch.inf)
        best = torch.topk(values_QP, min(k, values_QP.shape[1] - (not self.inductive)), dim=1)
        return best.values, self.pool_P[best.indices]

    def claims(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, falling, and rows (N, K) of the pool items that score each candidate highest."""

        def make():
            best = torch.empty(len(self.gallery_N), 0, device=self.gallery_N.device)
            rows = best.long()
            for part_P in self.parts(self.pool_P):
                scores_NP = torch.cat([best, self.scores(part_P).T], 1)
                part = torch.cat([rows, part_P.expand(len(scores_NP), -1)], 1)
                top = torch.topk(scores_NP, min(k, scores_NP.shape[1]), dim=1)
                best, rows = top.values, part.gather(1, top.indices)
            return best, rows

        return self.once(("claims", k), make)


def of_vectors(
    gallery: VectorScores,
    bank: VectorScores | None,
    sentences_NE: torch.Tensor | None = None,
    **pool,
) -> Problem:
    """The problem of a split's tower vectors, with train vectors as bank.

    `sentences_NE` are a sentence encoder's vectors of the gallery's texts, then the bank's.
    """
    parts = [gallery] if bank is None else [gallery, bank]
    images = torch.cat([part.images for part in parts])
    texts = torch.cat([part.texts for part in parts])
    sizes = {"image": len(gallery.images), "text": len(gallery.texts)}
    totals = {"image": len(images), "text": len(texts)}
    # A bank's image is not the gallery's, whatever its id.
    owners = [torch.from_numpy(part.items.image_of_N) for part in parts]
    owners[1:] = [owner_N + sizes["image"] for owner_N in owners[1:]]
    return Problem(
        Towers(images, texts, sentences_NE),
        gallery={side: torch.arange(size) for side, size in sizes.items()},
        bank={side: torch.arange(size, totals[side]) for side, size in sizes.items()},
        owner={"image": torch.arange(len(images)), "text": torch.cat(owners)},
        **pool,
    )
