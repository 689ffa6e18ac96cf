"""Losses and metrics straight from embeddings: the score matrix is never whole.

A block of it lives at a time. `target` and `mask` are matrices, or functions of (rows, columns),
two slices, that give that part of the matrix: for instance relevance computed from caption
embeddings when it is asked for.

Legend of the shape suffixes: Q queries, N candidates, M images, D embedding width, R rows of a
block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Settings
from pipeline.formulas.kernels.gradients import first_order
from pipeline.formulas.kernels.rows import blocks, in_full_precision, summed
from pipeline.formulas.losses.registry import function_of

BLOCK = 2**22  # scores in a block: enough for matrix products at full speed, and 16 MB
EVERYTHING = slice(None)
Matrix = Tensor | Callable[[slice, slice], Tensor]
# Queries, candidates, the gradients of both, target and mask.
Side = tuple[Tensor, Tensor, Tensor, Tensor, Matrix, Matrix | None]


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
    """Scalar: `both_directions(loss, image_MD @ text_ND.T, target)`, and the embeddings' gradients.

    In O(rows x candidates) memory. A pass over the images and one over the texts; each multiplies a
    block of scores, takes the loss and its gradient, and adds that gradient's products to those of
    both embeddings: six matrix products in place of three. Scale or normalise the embeddings
    outside. The settings are numbers: a learned temperature gets no gradient here.

    >>> from pipeline.formulas.losses import triplet
    >>> image, text = torch.eye(3)[:2], torch.eye(3)[:2]
    >>> both_directions_streamed(triplet, image, text, torch.eye(2) > 0)
    tensor(0.)
    """
    if needing := [k for k, v in settings.items() if torch.is_tensor(v) or k == "average"]:
        raise ValueError(
            f"{', '.join(needing)} cannot be streamed: settings are numbers, queries independent"
        )
    given = function_of(loss), target, mask, rows, settings
    total: Tensor = _Streamed.apply(image_MD, text_ND, *given)
    return total


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
    rows = rows or max(1, BLOCK // max(1, len(candidates_ND)))
    values = [
        metric(queries_QD[some] @ candidates_ND.T, _part(target, some, EVERYTHING), **settings)
        for some in blocks(len(queries_QD), rows)
    ]
    return torch.cat(values) if values else queries_QD.new_zeros(0, dtype=torch.float64)


def _part(whole: Matrix, rows: slice, columns: slice) -> Tensor:
    return whole(rows, columns) if callable(whole) else whole[rows, columns]


def _turned(whole: Matrix) -> Matrix:
    return lambda rows, columns: _part(whole, columns, rows).T


class _Streamed(torch.autograd.Function):
    @staticmethod
    @in_full_precision
    def forward(ctx: Any, image_MD: Tensor, text_ND: Tensor, *given: Any) -> Tensor:
        loss, target, mask, rows, settings = given
        ctx.dtypes = image_MD.dtype, text_ND.dtype
        wide = torch.promote_types(torch.promote_types(*ctx.dtypes), torch.float32)
        image_MD, text_ND = image_MD.to(wide), text_ND.to(wide)
        of_image_MD, of_text_ND = torch.zeros_like(image_MD), torch.zeros_like(text_ND)
        by_image = (image_MD, text_ND, of_image_MD, of_text_ND, target, mask)
        turned = _turned(target), None if mask is None else _turned(mask)
        by_text = (text_ND, image_MD, of_text_ND, of_image_MD, *turned)
        ctx.save_for_backward(of_image_MD, of_text_ND)
        return _one_way(loss, by_image, rows, settings) + _one_way(loss, by_text, rows, settings)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_image_MD, of_text_ND = ctx.saved_tensors
        of_image_MD, of_text_ND = of_image_MD * grad, of_text_ND * grad
        return of_image_MD.to(ctx.dtypes[0]), of_text_ND.to(ctx.dtypes[1]), *[None] * 5


def _one_way(loss: Function, side: Side, rows: int | None, settings: Settings) -> Tensor:
    """Half the mean loss of the queries; adds its gradients to of_query_QD and of_candidate_ND."""
    query_QD, candidate_ND, of_query_QD, of_candidate_ND, target, mask = side
    total = query_QD.new_zeros((), dtype=torch.float64)
    half_mean = 0.5 / max(1, len(query_QD))
    for some in blocks(len(query_QD), rows or max(1, BLOCK // max(1, len(candidate_ND)))):
        scores_RN = query_QD[some] @ candidate_ND.T
        target_RN = _part(target, some, EVERYTHING)
        mask_RN = None if mask is None else _part(mask, some, EVERYTHING)
        loss_sum, gradient_RN = summed(loss, scores_RN, target_RN, mask_QN=mask_RN, **settings)
        total += loss_sum * half_mean
        of_query_QD[some].addmm_(gradient_RN, candidate_ND, alpha=half_mean)
        of_candidate_ND.addmm_(gradient_RN.T, query_QD[some], alpha=half_mean)
    return total.to(query_QD.dtype)
