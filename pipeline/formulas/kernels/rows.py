"""Losses by blocks of rows: a query's loss needs its own row only.

So the value and the gradient are done at once, block after block.

Legend of the shape suffixes: Q queries, R rows of a block, N candidates of a query.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Kernel, Mask, Value
from pipeline.formulas.kernels.gradients import first_order

# Elements of a block's largest temporary: few enough that a block's few dozen passes stay in a CPU
# core's cache, and enough that a GPU is busy.
CACHE = {"cpu": 2**17, "cuda": 2**25}
P = ParamSpec("P")
R = TypeVar("R")
Target = TypeVar("Target", Tensor, None)


def prepared(
    scores_QN: Tensor, target_QN: Target, mask_QN: Mask, *, unscored: bool = False
) -> tuple[Tensor, Target, Mask]:
    """(scores_QN, target_QN, mask_QN): checked, in float32 or float64, and 0 where masked out.

    The zeros keep whatever is in padding, NaN included, out of the value and the gradient. With
    `unscored` a candidate of score -inf is masked out too.
    """
    others: list[Tensor] = [x for x in (target_QN, mask_QN) if x is not None]
    if scores_QN.dim() != 2 or any(x.shape != scores_QN.shape for x in others):
        shapes = ", ".join(str(tuple(x.shape)) for x in (scores_QN, *others))
        raise ValueError(f"scores, target and mask must all be (queries, candidates), got {shapes}")
    if mask_QN is not None and mask_QN.dtype != torch.bool:
        raise ValueError(f"mask_QN must be boolean, True = in the list, got {mask_QN.dtype}")
    scores_QN = scores_QN.to(loss_dtype(scores_QN))
    if target_QN is not None and target_QN.dtype != torch.bool:
        target_QN = target_QN.detach().to(scores_QN.dtype)
    if unscored:
        mask_QN = _scored(scores_QN.detach(), mask_QN)
    if mask_QN is not None:
        scores_QN = scores_QN.masked_fill(~mask_QN, 0)
        target_QN = None if target_QN is None else target_QN.masked_fill(~mask_QN, 0)
    return scores_QN, target_QN, mask_QN


def loss_dtype(scores_QN: Tensor) -> torch.dtype:
    """float64 for scores of float64, and float32 for all others."""
    return torch.float64 if scores_QN.dtype == torch.float64 else torch.float32


def _scored(scores_QN: Tensor, mask_QN: Mask) -> Mask:
    """mask_QN without the candidates of score -inf; None where it is known that all are in."""
    # On a processor a look is cheap; elsewhere it would wait for the device: always a mask there.
    look = scores_QN.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and (scores_QN.numel() == 0 or scores_QN.amin() > -torch.inf):
        return mask_QN
    scored_QN = scores_QN != -torch.inf
    return scored_QN if mask_QN is None else scored_QN & mask_QN


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function without autocast, which would make bfloat16 of its matrix products.

    It is told the device by the first tensor that the function is given.
    """

    @functools.wraps(function)
    def wrapped(*given: P.args, **settings: P.kwargs) -> R:
        device = next(x.device for x in given if torch.is_tensor(x))
        with torch.autocast(device.type, enabled=False):
            return function(*given, **settings)

    return wrapped


def rows_in_cache(elements_per_row: int, device: torch.device) -> int:
    """How many rows of `elements_per_row` elements fit the cache."""
    return max(1, CACHE.get(device.type, CACHE["cuda"]) // max(1, elements_per_row))


def blocks(total: int, rows: int) -> list[slice]:
    """Slices of up to `rows` over `total` rows."""
    return [slice(i, min(i + rows, total)) for i in range(0, total, rows)]


def block_of(x_QN: Tensor, rows: slice) -> Tensor:
    """x_QN[rows], contiguous.

    Columns of a matrix are copied as they lie first: four times as fast as one strided copy.
    """
    if x_QN.is_contiguous():
        return x_QN[rows]
    return x_QN.T[:, rows].contiguous().T.contiguous()


def add_block_(x_QN: Tensor, rows: slice, block_RN: Tensor, scale: float) -> None:
    """x_QN[rows] += scale x block_RN, with the detour of `block_of` where x_QN is a transpose."""
    if x_QN.is_contiguous():
        x_QN[rows].add_(block_RN, alpha=scale)
    else:
        x_QN.T[:, rows].add_(block_RN.T.contiguous(), alpha=scale)


def rowwise(kernel: Kernel, rows: int, scores_QN: Tensor, *others: Tensor | None) -> Tensor:
    """loss_Q with its gradient, a block of rows at a time.

    `kernel(scores_RN, *others of those rows, backward) -> (loss_R, gradient_RN)`, the gradient
    only if it is to go `backward`. It is kept from the forward pass, so the largest thing alive is
    one more Q x N matrix.
    """
    loss_Q: Tensor = _Rowwise.apply(scores_QN, kernel, rows, *others)
    return loss_Q


def differentiated(row_loss: Function) -> Kernel:
    """A kernel for `rowwise` from a differentiable `row_loss(scores_RN, *others) -> loss_R`."""

    def kernel(scores_RN: Tensor, *others: Tensor | None, backward: bool) -> Value:
        if not backward:
            return row_loss(scores_RN, *others), None
        with torch.enable_grad():
            scores_RN = scores_RN.detach().requires_grad_()
            loss_R = row_loss(scores_RN, *others)
            return loss_R.detach(), torch.autograd.grad(loss_R.sum(), scores_RN)[0]

    return kernel


class _Rowwise(torch.autograd.Function):
    @staticmethod
    @in_full_precision
    def forward(
        ctx: Any, scores_QN: Tensor, kernel: Kernel, rows_at_once: int, *others: Tensor | None
    ) -> Tensor:
        ctx.count = len(others)
        backward = ctx.needs_input_grad[0]
        loss_Q = scores_QN.new_empty(len(scores_QN))
        gradient_QN = torch.empty_like(scores_QN) if backward else None
        for rows in blocks(len(scores_QN), rows_at_once):
            of_rows = [None if other is None else block_of(other, rows) for other in others]
            part_RN = block_of(scores_QN, rows)
            loss_Q[rows], gradient_RN = kernel(part_RN, *of_rows, backward=backward)
            if gradient_QN is None:
                continue
            assert gradient_RN is not None, "a kernel gives the gradient it is asked for"
            if gradient_QN.is_contiguous():
                gradient_QN[rows] = gradient_RN
            else:
                gradient_QN.T[:, rows] = gradient_RN.T.contiguous()
        if backward:
            ctx.save_for_backward(gradient_QN)
        return loss_Q

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_QN,) = ctx.saved_tensors
        return gradient_QN * grad_Q[:, None], None, None, *[None] * ctx.count
