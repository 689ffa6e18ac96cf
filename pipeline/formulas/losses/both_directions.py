"""A loss of images and texts: the mean of both directions, each list a row."""

from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Settings
from pipeline.formulas.kernels.gradients import first_order
from pipeline.formulas.kernels.rows import (
    add_block_,
    block_of,
    blocks,
    loss_dtype,
    rows_in_cache,
)
from pipeline.formulas.losses.in_blocks import in_blocks
from pipeline.formulas.losses.registry import LOSSES, function_of


def both_directions(
    loss: str | Function, scores_QN: Tensor, target_QN: Tensor, **settings: Any
) -> Tensor:
    """Scalar: the mean of the rows' losses and the mean of the columns' losses, halved.

    The columns see transposed scores and transposed targets, and every setting whose name ends in
    `_QN` transposed. `loss` is a function or a name of LOSSES.

    >>> import torch
    >>> both_directions("triplet", torch.eye(2), torch.eye(2, dtype=torch.bool))
    tensor(0.)
    """
    loss = function_of(loss)
    learned = any(torch.is_tensor(value) and value.requires_grad for value in settings.values())
    if (
        scores_QN.requires_grad
        and any(loss is known.function for known in LOSSES.values())
        and not learned
        and "average" not in settings
    ):
        total: Tensor = _BothDirections.apply(scores_QN, loss, target_QN, settings)
        return total
    of_rows = loss(scores_QN, target_QN, **settings).mean()
    return (of_rows + loss(scores_QN.T, target_QN.T, **_turned(settings)).mean()) / 2


def _turned(settings: Settings) -> Settings:
    return {k: v.T if k.endswith("_QN") and v is not None else v for k, v in settings.items()}


class _BothDirections(torch.autograd.Function):
    """Block by block into one gradient matrix: half the memory of two losses side by side.

    It is of float32 for scores of less: without the loss scale, which comes in from above, most of
    a long list's gradient is below the range of float16. The backward pass gives the matrix away;
    should it be called again, it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, scores_QN: Tensor, loss: Function, target_QN: Tensor, settings: Settings
    ) -> Tensor:
        ctx.save_for_backward(scores_QN, target_QN)
        ctx.loss, ctx.settings = loss, settings
        total, ctx.gradient_QN = _both_ways(scores_QN, loss, target_QN, settings)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient_QN, ctx.gradient_QN = ctx.gradient_QN, None
        if gradient_QN is None:
            scores_QN, target_QN = ctx.saved_tensors
            _, gradient_QN = _both_ways(scores_QN, ctx.loss, target_QN, ctx.settings)
        return gradient_QN.mul_(grad).to(ctx.saved_tensors[0].dtype), None, None, None


def _both_ways(
    scores_QN: Tensor, loss: Function, target_QN: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(loss, gradient_QN) of both directions."""
    dtype = loss_dtype(scores_QN)
    gradient_QN = torch.zeros(scores_QN.shape, dtype=dtype, device=scores_QN.device)
    of_rows = _one_way(scores_QN, loss, target_QN, settings, gradient_QN)
    turned = scores_QN.T, loss, target_QN.T, _turned(settings), gradient_QN.T
    return (of_rows + _one_way(*turned)).to(dtype), gradient_QN


def _one_way(
    scores_QN: Tensor, loss: Function, target_QN: Tensor, settings: Settings, gradient_QN: Tensor
) -> Tensor:
    """Half the mean loss of the rows, in float64; adds its gradient to gradient_QN."""
    half_mean = 0.5 / max(1, len(scores_QN))

    def lists(rows: slice) -> tuple[Tensor, Tensor, Settings]:
        of_rows = {
            k: block_of(v, rows) if k.endswith("_QN") and v is not None else v
            for k, v in settings.items()
        }
        return block_of(scores_QN, rows), block_of(target_QN, rows), of_rows

    sums, _ = in_blocks(
        lambda scores_RN, target_RN, given: {"": loss(scores_RN, target_RN, **given)},
        blocks(len(scores_QN), rows_in_cache(scores_QN.shape[1] // 4, scores_QN.device)),
        lists,
        lambda rows, part_RN: add_block_(gradient_QN, rows, part_RN, half_mean),
    )
    return sum(sums.values(), scores_QN.new_zeros((), dtype=torch.float64)) * half_mean
