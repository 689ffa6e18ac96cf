"""Losses whose value and gradient are one kernel in Triton, where there is a GPU and Triton.

CUDA builds of torch bring Triton along; TRITON_INTERPRET=1, set before it is imported, runs the
kernels on a processor, slowly, for tests. Everywhere else, and for float64, the passes in torch
serve. What is told here needs no Triton: the kernels are imported when the first of them is run.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Settings

# run(scores_QN, gradient_QN or None, scale=1.0, add=False) -> loss_Q; fills gradient_QN, which lies
# as scores_QN does, with scale x the gradient, or adds that to it.
Run = Callable[..., Tensor]
# The scores that the kernel takes, the kernel, and the settings of the loss of those scores.
Fused = tuple[Tensor, Run, Settings]
OLDEST = 3, 4  # Triton whose language the kernels are written in
LONGEST = 2**20  # candidates: sums of that many are sure to fit their whole numbers


@functools.cache
def kernels() -> Any:
    """The module that starts the kernels, or None where Triton is not installed, or an old one."""
    if find_spec("triton") is None:
        return None
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        return None
    return importlib.import_module("pipeline.formulas.kernels.fused.launch")


def interpreted() -> bool:
    """Whether the kernels run on the processor, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(scores_QN: Tensor, target_QN: Tensor) -> Any:
    """The module that starts the kernels if they can take these lists, else None."""
    small = scores_QN.numel() == 0 or scores_QN.shape[1] > LONGEST
    if small or scores_QN.dtype == torch.float64 or not scores_QN.is_floating_point():
        return None
    if target_QN.device != scores_QN.device or torch.compiler.is_compiling():
        return None
    if scores_QN.device.type not in ("cpu", "cuda") or torch.version.hip:
        return None
    if interpreted() != (scores_QN.device.type == "cpu"):
        return None
    return kernels()


def gradient_like(scores_QN: Tensor) -> Tensor:
    """Room for a gradient in float32 that lies as the scores do: by rows, or by columns."""
    turned = not scores_QN.is_contiguous() and scores_QN.T.is_contiguous()
    shape = scores_QN.T.shape if turned else scores_QN.shape
    empty = torch.empty(shape, dtype=torch.float32, device=scores_QN.device)
    return empty.T if turned else empty


def loss_of(scores_QN: Tensor, run: Run, plain: Function) -> Tensor:
    """loss_Q through which a gradient flows; `plain` is the loss of these scores in torch."""
    loss_Q: Tensor = _Fused.apply(scores_QN, run, plain)
    return loss_Q


def both_ways(
    loss: Function, scores_QN: Tensor, target_QN: Tensor, settings: Settings, turned: Settings
) -> tuple[Tensor, Tensor] | None:
    """(mean of both directions' losses, gradient_QN), or None where no kernel takes them.

    `turned` are the settings for the columns. Their kernel reads the matrix as it lies and adds to
    the rows' gradient, so one more matrix is all the memory there is.
    """
    if (of := getattr(loss, "fused", None)) is None or 0 in scores_QN.shape:
        return None
    scores_QN = scores_QN.detach()
    if not scores_QN.T.is_contiguous():
        scores_QN = scores_QN.contiguous()
    columns_NQ = scores_QN.T
    by_row = of(scores_QN, target_QN, **settings)
    by_column = of(columns_NQ, target_QN.T, **turned)
    if by_row is None or by_column is None:
        return None
    gradient_QN = gradient_like(scores_QN)
    half_means = 0.5 / scores_QN.shape[0], 0.5 / scores_QN.shape[1]
    of_rows = by_row(scores_QN, gradient_QN, half_means[0]).double().sum()
    of_columns = by_column(columns_NQ, gradient_QN.T, half_means[1], True).double().sum()
    return (of_rows * half_means[0] + of_columns * half_means[1]).float(), gradient_QN


class _Fused(torch.autograd.Function):
    """The gradient comes with the value; the backward pass scales it and gives it away.

    Should it be called again, it is computed again. A gradient that may be differentiated once more
    (`create_graph=True`) is that of the loss in torch, or what is said of it there.
    """

    @staticmethod
    def forward(ctx: Any, scores_QN: Tensor, run: Run, plain: Function) -> Tensor:
        ctx.save_for_backward(scores_QN)
        ctx.run, ctx.plain = run, plain
        ctx.gradient_QN = gradient_like(scores_QN) if ctx.needs_input_grad[0] else None
        return run(scores_QN, ctx.gradient_QN)

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scores_QN,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss_Q = ctx.plain(scores_QN)
            found = torch.autograd.grad(loss_Q, scores_QN, grad_Q, create_graph=True)
            return *found, None, None
        gradient_QN, ctx.gradient_QN = ctx.gradient_QN, None
        if gradient_QN is None:
            gradient_QN = gradient_like(scores_QN)
            ctx.run(scores_QN, gradient_QN)
        return gradient_QN.mul_(grad_Q[:, None]).to(scores_QN.dtype), None, None
