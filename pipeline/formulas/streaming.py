"""Losses and metrics straight from embeddings: the score matrix is never whole.

A block of it lives at a time. `target` and `mask` are matrices, or functions of (rows, columns),
two slices, that give that part of the matrix: for instance relevance computed from caption
embeddings when it is asked for.

Legend of the shape suffixes: Q queries, N candidates, M images, D embedding width, R rows of a
block.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Mask
from pipeline.formulas.kernels.gradients import first_order
from pipeline.formulas.kernels.rows import blocks, in_full_precision
from pipeline.formulas.losses.in_blocks import Terms, in_blocks
from pipeline.formulas.losses.registry import function_of

BLOCK = 2**20  # scores in a block: enough for matrix products at full speed, and 4 MB
LISTS = 32  # of a block at least: of fewer, adding to all candidates' gradients is most of the work
EVERYTHING = slice(None)
Matrix = Tensor | Callable[[slice, slice], Tensor]
Given = Callable[[slice], tuple[Any, ...]]  # what the loss of these queries takes after the scores


def rows_of_block(candidates: int) -> int:
    """How many lists of `candidates` are worked on at a time, unless told otherwise.

    >>> rows_of_block(1024), rows_of_block(131072)
    (1024, 32)
    """
    return max(LISTS, BLOCK // max(1, candidates))


def both_directions_streamed(
    loss: str | Function,
    image_MD: Tensor,
    text_ND: Tensor,
    target: Matrix,
    *,
    mask: Matrix | None = None,
    rows: int | None = None,
    **settings: Any,
) -> Tensor:
    """Scalar: `both_directions(loss, image_MD @ text_ND.T, target)`, and its gradients.

    In O(rows x candidates) memory. A pass over the images and one over the texts; each multiplies a
    block of scores, takes the loss and its gradient, and adds that gradient's products to those of
    both embeddings: six matrix products in place of three. Scale or normalise the embeddings
    outside. A setting that may be learned gets its gradient too.

    >>> from pipeline.formulas.losses import triplet
    >>> image, text = torch.eye(3)[:2], torch.eye(3)[:2]
    >>> both_directions_streamed(triplet, image, text, torch.eye(2) > 0)
    tensor(0.)
    """
    if refused := [name for name in settings if name == "average" or name.endswith("_QN")]:
        raise ValueError(
            f"{', '.join(refused)} cannot be streamed: queries are independent, and what is a "
            "matrix is target or mask"
        )
    loss = function_of(loss)

    def terms(scores_RN: Tensor, target_RN: Tensor, mask_RN: Mask) -> list[tuple[str, Tensor]]:
        return [("", loss(scores_RN, target_RN, mask_QN=mask_RN, **settings))]

    def of_images(some: slice) -> tuple[Tensor | None, ...]:
        return tuple(_part(x, some, EVERYTHING) for x in (target, mask))

    def of_texts(some: slice) -> tuple[Tensor | None, ...]:
        return tuple(_turned(_part(x, EVERYTHING, some)) for x in (target, mask))

    directions = [_Direction(0, 1, of_images), _Direction(1, 0, of_texts)]
    learned = [v for v in settings.values() if torch.is_tensor(v) and v.requires_grad]
    work = _Work(terms, directions, rows, 2)
    total: Tensor = _Streamed.apply(work, image_MD, text_ND, *learned)
    return total


def lists_streamed(
    terms: Terms,
    query_QD: Tensor,
    candidate_ND: Tensor,
    given: Given,
    *,
    rows: int | None = None,
    learned: Sequence[Tensor] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean of the terms' sum over the queries, each term's mean) of `query_QD @ candidate_ND.T`.

    In O(rows x candidates) memory. `terms(scores_RN, *given(some))` gives (name, loss_R) for the
    queries of a slice, one after the other, such as `WeightedSum.each`; `given` makes what it takes
    when its turn comes, slice after slice. The first value has gradients: the embeddings', and
    those of the `learned` tensors that `terms` uses. They are computed with the value, so that
    nothing but them is kept for the way back.

    >>> from pipeline.formulas.losses import WeightedSum
    >>> loss, x, own = WeightedSum({"triplet": {}}), torch.eye(2), torch.eye(2) > 0
    >>> lists_streamed(loss.each, x, x, lambda some: (own[some], None))
    (tensor(0.), {'triplet': tensor(0.)})
    """
    work = _Work(terms, [_Direction(0, 1, given)], rows, 2)
    total: Tensor = _Streamed.apply(work, query_QD, candidate_ND, *learned)
    return total, work.means


@in_full_precision
def metric_streamed(
    metric: Function,
    queries_QD: Tensor,
    candidates_ND: Tensor,
    target: Matrix,
    *,
    rows: int | None = None,
    **settings: Any,
) -> Tensor:
    """value_Q: `metric(queries_QD @ candidates_ND.T, target)`, in O(rows x candidates) memory.

    >>> from pipeline.formulas.metrics import recall_at
    >>> metric_streamed(recall_at, torch.eye(2), torch.eye(2), torch.eye(2) > 0, k=1)
    tensor([1., 1.], dtype=torch.float64)
    """
    values = [
        metric(queries_QD[some] @ candidates_ND.T, _part(target, some, EVERYTHING), **settings)
        for some in blocks(len(queries_QD), rows or rows_of_block(len(candidates_ND)))
    ]
    return torch.cat(values) if values else queries_QD.new_zeros(0, dtype=torch.float64)


def _part(whole: Matrix | None, rows: slice, columns: slice) -> Any:
    if whole is None:
        return None
    return whole(rows, columns) if callable(whole) else whole[rows, columns]


def _turned(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.T


@dataclass(frozen=True)
class _Direction:
    """Which of the embeddings look for which, and what their loss takes after the scores."""

    query: int
    candidate: int
    given: Given


@dataclass
class _Work:
    """What is to be done, and the means of the terms when it is."""

    terms: Terms
    directions: list[_Direction]
    rows: int | None
    embeddings: int  # how many of the tensors are; the others are learned settings
    means: dict[str, Tensor] = field(default_factory=dict)


class _Streamed(torch.autograd.Function):
    """The gradients are computed with the value, in float32 or more: the loss scale comes later."""

    @staticmethod
    @in_full_precision
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Tensor:
        ctx.dtypes = [x.dtype for x in tensors]
        embeddings, learned = tensors[: work.embeddings], tensors[work.embeddings :]
        dtypes = (x.dtype for x in embeddings)
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        embeddings = tuple(x.to(wide) for x in embeddings)
        gradients = [torch.zeros_like(x) for x in embeddings]
        of_learned = [torch.zeros_like(x) for x in learned]
        for direction in work.directions:
            means, more = _one_way(work, direction, embeddings, gradients, learned)
            for of_one, part in zip(of_learned, more, strict=True):
                of_one += part
            for name, mean in means.items():
                work.means[name] = work.means.get(name, 0) + mean
        ctx.save_for_backward(*gradients, *of_learned)
        total = sum(work.means.values(), torch.zeros((), dtype=wide, device=tensors[0].device))
        work.means = {name: mean.to(wide) for name, mean in work.means.items()}
        return total.to(wide)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *((gradient * grad).to(dtype) for gradient, dtype in found)


def _one_way(
    work: _Work,
    direction: _Direction,
    embeddings: Sequence[Tensor],
    gradients: Sequence[Tensor],
    learned: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A direction's share of the means, and of the learned gradients; adds to the embeddings'."""
    query_QD, candidate_ND = embeddings[direction.query], embeddings[direction.candidate]
    of_query_QD, of_candidate_ND = gradients[direction.query], gradients[direction.candidate]
    share = 1 / len(work.directions) / max(1, len(query_QD))

    def lists(some: slice) -> tuple[Any, ...]:
        given = direction.given(some)
        return query_QD[some] @ candidate_ND.T, *given

    def take(some: slice, gradient_RN: Tensor) -> None:
        of_query_QD[some].addmm_(gradient_RN, candidate_ND, alpha=share)
        of_candidate_ND.addmm_(gradient_RN.T, query_QD[some], alpha=share)

    some = blocks(len(query_QD), work.rows or rows_of_block(len(candidate_ND)))
    sums, of_learned = in_blocks(work.terms, some, lists, take, learned)
    means = {name: value * share for name, value in sums.items()}
    return means, [gradient * share for gradient in of_learned]
