"""Smooth ranks: how many candidates stand above each one, with a soft step in place of a hard one.

Legend of the shape suffixes: Q queries, R rows of a block, N candidates of a query, J candidates of
a chunk.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Mask
from pipeline.formulas.kernels.binned import Grid, cells_per_tau, grid_length
from pipeline.formulas.kernels.gradients import first_order, over_temperature
from pipeline.formulas.kernels.rows import (
    block_of,
    blocks,
    in_full_precision,
    prepared,
    rows_in_cache,
)
from pipeline.formulas.kernels.sort import compiled

METHODS = ("auto", "dense", "chunked", "binned", "fast")


def smooth_rank(
    scores_QN: Tensor,
    *,
    tau: float | Tensor,
    mask_QN: Mask = None,
    method: str = "auto",
    error: float = 4e-5,
) -> Tensor:
    """rank_QN: 1 + the smoothed number of candidates that score above each candidate.

    rank_j = 1 + sum over k != j of sigmoid((s_k - s_j) / tau). Ranks are places, counted from 1;
    `tau` has the unit of the scores, and tau -> 0 gives the average rank under ties. A candidate
    outside `mask_QN` has rank inf and no say. Methods: `dense` and `chunked` are exact, O(N^2);
    `dense` holds Q x N x N, `chunked` a piece of it at a time. `binned` is O(N + grid). Each of its
    ranks is off by at most `error` of itself, plus N exp(-20), plus the rounding of (score range) /
    tau in the scores' precision; the gradient by about 10 times that of its largest entry. The grid
    has (score range) / tau x 3 cells or more; where it would be dearer than the pairs, `chunked`
    steps in. `fast` is `binned` compiled by numba, for float32 on a CPU. `auto` takes `fast` or
    else `binned` for lists of 128 or more that are not float64, and an exact method otherwise.
    Scores of less precision are taken to float32. NaN or inf makes all ranks of its query NaN.
    `tau` may be a learned tensor. The sum is that of S-NDCG in Listwise ITR (arXiv 2305.16566); the
    binned method is ours.

    >>> smooth_rank(torch.tensor([[0.9, 0.1, 0.5]]), tau=1e-3)
    tensor([[1., 3., 2.]])
    """
    scores_QN, _, mask_QN = prepared(scores_QN, None, mask_QN)
    scores_QN, tau = with_tau(scores_QN, tau)
    rank_QN: Tensor = _SmoothRank.apply(scores_QN, mask_QN, tau, method, error)
    return rank_QN if mask_QN is None else rank_QN.masked_fill(~mask_QN, torch.inf)


def with_tau(scores_QN: Tensor, tau: float | Tensor) -> tuple[Tensor, float]:
    """(scores_QN, tau) of the same ranks, tau a number: it acts on scores / tau alone.

    So a tau that is a tensor gets its gradient from the scores'.

    >>> with_tau(torch.tensor([[1.0, 2.0]]), torch.tensor(0.5))
    (tensor([[2., 4.]]), 1.0)
    """
    return (over_temperature(scores_QN, tau), 1.0) if torch.is_tensor(tau) else (scores_QN, tau)


def check_steps(tau: float, method: str, error: float) -> None:
    """Raises where these are no settings of a smooth rank."""
    if not (tau > 0 and error > 0) or method not in METHODS:
        raise ValueError(
            f"tau and error must be above 0 and method one of {', '.join(METHODS)}, "
            f"got {tau}, {error} and {method!r}"
        )


def stepper(
    scores_QN: Tensor,
    *,
    tau: float,
    method: str = "auto",
    error: float = 4e-5,
    score_range: float | None = None,
) -> tuple["Step", int]:
    """(step, rows): `rank` and `gradient` for blocks of up to `rows` rows of these scores.

    With a `score_range` a device is not asked how far apart the scores are; a row that is wider
    (by more than 2 %, for rounding) is NaN.

    >>> type(stepper(torch.rand(2, 3), tau=0.1)[0]).__name__
    'Exact'
    """
    check_steps(tau, method, error)
    queries, n = scores_QN.shape
    small = n < 128 or scores_QN.dtype == torch.float64
    cells = cells_per_tau(error)
    length = math.inf
    if scores_QN.device.type == "cpu":
        score_range = None  # a look is cheap, and the grid no longer than it has to be
    if scores_QN.numel() > 0 and (method in ("binned", "fast") or (method == "auto" and not small)):
        widest = None if score_range is None else 1.02 * score_range
        length = grid_length(scores_QN, tau, cells, widest)
    if length <= max(n * n // 8, 64):  # beyond, the grid is dearer than the pairs
        rows = min(queries, rows_in_cache(max(n, int(length)), scores_QN.device))
        can = scores_QN.dtype == torch.float32 and scores_QN.device.type == "cpu"
        fast = compiled() if can and method != "binned" else None
        given: dict[str, Any] = {"tau": tau, "cells": cells, "length": int(length)}
        if fast:
            return fast.FastGrid(rows, scores_QN, **given), rows
        return Grid(rows, scores_QN, **given, bounded=score_range is not None), rows
    if method == "dense":
        return Exact(tau, chunk=n), max(1, queries)
    chunk = min(n, rows_in_cache(n, scores_QN.device))
    return Exact(tau, chunk), rows_in_cache(n * n, scores_QN.device)


class Exact:
    """The pairs themselves, `chunk` candidates against all at a time."""

    def __init__(self, tau: float, chunk: int):
        self.tau, self.chunk = tau, max(1, chunk)

    def rank(self, scores_RN: Tensor, mask_RN: Mask, out_RN: Tensor) -> Tensor:
        """Fills out_RN with 1/2 + the sum of the step over every k, itself included."""
        self.scores_RN = scores_RN
        for some in self._chunks():
            step_RJN = self._step(some)
            if mask_RN is not None:
                step_RJN = step_RJN * mask_RN[:, None, :]
            torch.sum(step_RJN, -1, out=out_RN[:, some])
        return out_RN.add_(0.5)

    def gradient(self, grad_RN: Tensor, mask_RN: Mask, out_RN: Tensor) -> Tensor:
        """Fills out_RN with d(sum of grad x rank) / d(scores) of the block that `rank` saw last."""
        if mask_RN is not None:
            grad_RN = grad_RN * mask_RN
        out_RN.zero_()
        for some in self._chunks():
            step_RJN = self._step(some)
            slope_RJN = step_RJN.sub_(step_RJN.square())
            if mask_RN is not None:
                slope_RJN *= mask_RN[:, None, :]
            # A rank rises with every other score and falls with the candidate's own.
            out_RN += (grad_RN[:, None, some] @ slope_RJN)[:, 0]
            out_RN[:, some] -= grad_RN[:, some] * slope_RJN.sum(-1)
        return out_RN.div_(self.tau)

    def _chunks(self) -> list[slice]:
        n = self.scores_RN.shape[1]
        return [slice(i, i + self.chunk) for i in range(0, n, self.chunk)]

    def _step(self, some: slice) -> Tensor:
        above_RJN = self.scores_RN[:, None, :] - self.scores_RN[:, some, None]
        return above_RJN.div_(self.tau).sigmoid_()


Step = Grid | Exact


class _SmoothRank(torch.autograd.Function):
    """Keeps only the scores; the backward pass computes each block's ranks again."""

    @staticmethod
    @in_full_precision
    def forward(ctx: Any, scores_QN: Tensor, mask_QN: Mask, *settings: Any) -> Tensor:
        ctx.save_for_backward(scores_QN, mask_QN)
        ctx.settings = settings
        rank_QN = torch.empty_like(scores_QN, memory_format=torch.contiguous_format)
        for rows, step, scores_RN, mask_RN in _by_block(scores_QN, mask_QN, settings):
            step.rank(scores_RN, mask_RN, rank_QN[rows])
        return rank_QN

    @staticmethod
    @first_order
    @in_full_precision
    def backward(ctx: Any, grad_QN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scores_QN, mask_QN = ctx.saved_tensors
        gradient_QN = torch.empty_like(scores_QN, memory_format=torch.contiguous_format)
        for rows, step, scores_RN, mask_RN in _by_block(scores_QN, mask_QN, ctx.settings):
            step.rank(scores_RN, mask_RN, torch.empty_like(scores_RN))
            step.gradient(block_of(grad_QN, rows), mask_RN, gradient_QN[rows])
        return gradient_QN, None, None, None, None


def _by_block(
    scores_QN: Tensor, mask_QN: Mask, settings: tuple[float, str, float]
) -> Iterator[tuple[slice, Step, Tensor, Mask]]:
    tau, method, error = settings
    step, rows_at_once = stepper(scores_QN, tau=tau, method=method, error=error)
    for rows in blocks(len(scores_QN), rows_at_once):
        mask_RN = None if mask_QN is None else block_of(mask_QN, rows)
        yield rows, step, block_of(scores_QN, rows), mask_RN
