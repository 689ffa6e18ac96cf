"""A loss and its gradient, a block of queries at a time.

A query's loss needs its own list alone, so lists may be made when their turn comes and be gone
before the next: who has them gives them by the block, and takes a block's gradient.

Legend of the shape suffixes: R queries of a block, N candidates of a query.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels.rows import loss_dtype

Terms = Callable[..., dict[str, Tensor]]  # loss_R by name, of scores_RN and what else it is given
Lists = Callable[[slice], tuple[Any, ...]]  # scores_RN of these queries, and what else it is given
Take = Callable[[slice, Tensor], None]  # takes the gradient of the sum by scores_RN


def in_blocks(
    terms: Terms, blocks: Iterable[slice], lists: Lists, take: Take, learned: Sequence[Tensor] = ()
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(sum of each term over all queries in float64, its gradient by each learned setting).

    `take` gets the gradient of the terms' sum, of float32 for scores of less.
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
    with torch.enable_grad():
        scores_RN = scores_RN.detach().to(loss_dtype(scores_RN)).requires_grad_()
        found = {name: loss_R.sum() for name, loss_R in terms(scores_RN, *others).items()}
        total = functools.reduce(torch.add, found.values())
        wanted = (scores_RN, *learned)
        gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    take(rows, gradients[0])
    for of_one, gradient in zip(of_learned, gradients[1:], strict=True):
        of_one += gradient
    return {name: value.detach().double() for name, value in found.items()}
