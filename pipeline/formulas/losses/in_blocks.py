"""A loss and its gradient, a block of queries at a time.

A query's loss needs its own list alone, so lists may be made when their turn comes and be gone
before the next: who has them gives them by the block, and takes a block's gradient.

Legend of the shape suffixes: R queries of a block, N candidates of a query.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels.rows import loss_dtype

# (name, loss_R) one after the other, of scores_RN and what else it is given; each from the scores
# alone, since what one is made of is gone when the next is.
Terms = Callable[..., Iterable[tuple[str, Tensor]]]
Lists = Callable[[slice], tuple[Any, ...]]  # scores_RN of these queries, and what else it is given
Take = Callable[[slice, Tensor], None]  # takes the gradient of the sum by scores_RN


def in_blocks(
    terms: Terms, blocks: Iterable[slice], lists: Lists, take: Take, learned: Sequence[Tensor] = ()
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(sum of each term over all queries in float64, their gradient by each learned setting).

    `take` gets the gradient of the terms' sum, of float32 for scores of less. A term's own is taken
    before the next term is asked for, so that no two of them hold memory.
    """
    sums: dict[str, Tensor] = {}
    of_learned = [torch.zeros_like(setting) for setting in learned]
    for rows in blocks:
        for name, value in _block(terms, rows, lists, take, learned, of_learned).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums, of_learned


def _block(
    terms: Terms,
    rows: slice,
    lists: Lists,
    take: Take,
    learned: Sequence[Tensor],
    of_learned: list[Tensor],
) -> dict[str, Tensor]:
    """Sums of the terms over a block, of which nothing is left when the next one is made."""
    scores_RN, *others = lists(rows)
    scores_RN = scores_RN.detach().to(loss_dtype(scores_RN)).requires_grad_()
    sums: dict[str, Tensor] = {}
    gradient_RN: Tensor | None = None
    with torch.enable_grad():
        for name, loss_R in terms(scores_RN, *others):
            total, wanted = loss_R.sum(), (scores_RN, *learned)
            of_scores_RN, *more = torch.autograd.grad(total, wanted, materialize_grads=True)
            sums[name] = total.detach().double()
            gradient_RN = of_scores_RN if gradient_RN is None else gradient_RN + of_scores_RN
            del of_scores_RN
            for of_one, gradient in zip(of_learned, more, strict=True):
                of_one += gradient
    if gradient_RN is not None:
        take(rows, gradient_RN)
    return sums
