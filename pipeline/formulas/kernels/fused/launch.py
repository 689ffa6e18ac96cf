"""Starts the Triton kernels: what they are given, how much of it at once, and their scratch.

Nothing here waits for the device, so all of it can be captured in a CUDA graph. Sizes follow from
the shape and the settings alone; there is no autotuning, so a loss has one value.

Legend of the shape suffixes: Q queries, N candidates of a query, T blocks of a list.
"""

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Mask
from pipeline.formulas.kernels.binned import REACH, cells_per_tau, steps
from pipeline.formulas.kernels.fused import Run, binned, cross_entropy, hinge_pairs, pairs
from pipeline.formulas.kernels.fused.ideal import BINS, FINE

TILE = 64  # cells of a tile of the grid, as the kernels have it
SHORT = 256  # candidates up to which all pairs are dearer by nothing that matters
SORTED = 1024  # candidates up to which gains are sorted
TILES = (16, 64)  # of a grid: at least, at most (powers of two; 16 is what a tensor core takes)
WIDE = 204  # tau: the grid's width where no range of scores is known
ROWS = 16  # of the matrix in which several lists' grids go through the step
PULLS = 2**21  # numbers that all programs of the pairs' kernel keep together, at most
IN_32_BITS = 4096  # candidates whose sums 32 bits hold finely enough; longer lists take 64


def smooth_ndcg(
    relevance_QN: Tensor, mask_QN: Mask, *, tau: float, error: float, score_range: float | None
) -> Run:
    """The kernel of S-NDCG for these lists."""

    def run(
        scores_QN: Tensor, gradient_QN: Tensor | None, scale: float = 1.0, add: bool = False
    ) -> Tensor:
        laid, down, along = _laid(scores_QN, relevance_QN, mask_QN)
        given = _Lists(laid, gradient_QN, down, along, scale, add)
        queries, n = scores_QN.shape
        with _on(scores_QN):
            if n <= SHORT:
                return given.by_pairs(tau, _power(n))
            loss_Q, ideal_Q, wide_Q = given.over_grid(tau, error, score_range)
            return given.by_pairs(tau, 0, loss_Q, ideal_Q, wide_Q)

    return run


class _Lists:
    """S-NDCG's lists and the matrix of its gradient, as the kernels are given them."""

    def __init__(
        self,
        laid: tuple[Tensor, ...],
        gradient_QN: Tensor | None,
        down: int,
        along: int,
        scale: float,
        add: bool,
    ):
        scores_QN, relevance_QN, mask_QN = laid
        self.scores_QN, (self.queries, self.n) = scores_QN, scores_QN.shape
        out_QN = scores_QN if gradient_QN is None else gradient_QN
        self.matrices = scores_QN, relevance_QN, mask_QN, out_QN
        self.down, self.along, self.scale = down, along, scale
        self.how = {
            "MASKED": mask_QN is not scores_QN,
            "BACKWARD": gradient_QN is not None,
            "ADD": add,
        }

    def over_grid(
        self, tau: float, error: float, score_range: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_Q, ideal_Q, wide_Q), without the lists that are wider than the grid."""
        like, n = self.scores_QN, self.n
        cells = max(4, cells_per_tau(error))
        reach = -(-REACH * cells // TILE)
        tiles = _tiles(WIDE if score_range is None else score_range * 1.02 / tau, cells)
        # 512 candidates at once; of a short list fewer columns, so that all processors have some.
        lists = 1 if self.along == 1 else 4 if self.queries <= 2048 else 8
        warps = 16 if lists == 8 else 8
        # 16 warps of 128 registers a processor, in one program or in two.
        programs = _programs(-(-self.queries // lists), like, 16 // warps)
        slots, grid = programs * lists, tiles * TILE
        whole, fixed = (torch.int32, 2.0**30) if n <= IN_32_BITS else (torch.int64, 2.0**50)
        sums = like.new_empty(slots, grid, dtype=whole)
        above, below = like.new_empty(2, slots, grid, dtype=torch.float32)
        sort = _power(n) if n <= SORTED else 0
        coarse = like.new_empty(0 if sort else (slots, BINS.value), dtype=torch.int32)
        fine = like.new_empty(0 if sort else (slots, FINE.value), dtype=torch.int64)
        loss_Q, ideal_Q = like.new_empty(2, self.queries, dtype=torch.float32)
        wide_Q = like.new_empty(self.queries, dtype=torch.int32)
        unit = 2.0**41 / _power(n) / BINS.value
        tables = _table(cells, reach, like.device), _discounts(n, like.device)
        binned.smooth_ndcg[(programs,)](
            *self.matrices, loss_Q, ideal_Q, wide_Q, sums, above, below, coarse, fine, *tables,
            self.queries, n, self.down, self.along, cells / tau, fixed, unit, self.scale,
            **self.how, SORT=sort, LISTS=lists, TOGETHER=min(lists, max(1, ROWS // tiles)),
            BLOCK=512 // lists, TILES=tiles, REACH=reach,
            num_warps=warps, num_stages=1, maxnreg=128,
        )  # fmt: skip
        return loss_Q, ideal_Q, wide_Q

    def by_pairs(
        self,
        tau: float,
        sort: int,
        loss_Q: Tensor | None = None,
        ideal_Q: Tensor | None = None,
        wide_Q: Tensor | None = None,
    ) -> Tensor:
        """loss_Q: of all lists, or of those that `wide_Q` names, in its place."""
        like = self.scores_QN
        programs = min(_programs(self.queries, like, 8), max(64, PULLS // self.n))
        pulls = like.new_empty(programs, self.n, dtype=torch.float32)
        if loss_Q is None:
            loss_Q = like.new_empty(self.queries, dtype=torch.float32)
        block = min(64, max(16, sort or 64))
        pairs.smooth_ndcg[(programs,)](
            *self.matrices, loss_Q, loss_Q if ideal_Q is None else ideal_Q,
            loss_Q if wide_Q is None else wide_Q, pulls,
            self.queries, self.n, self.down, self.along, 1 / tau, self.scale,
            **self.how, SORT=sort, BLOCK=block, OTHERS=block,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return loss_Q


def info_nce(positive_QN: Tensor, mask_QN: Mask, *, temperature: float, positives: str) -> Run:
    """The kernel of InfoNCE for these lists."""

    def run(
        scores_QN: Tensor, gradient_QN: Tensor | None, scale: float = 1.0, add: bool = False
    ) -> Tensor:
        (laid, positive, mask), down, along = _laid(scores_QN, positive_QN, mask_QN)
        out_QN = laid if gradient_QN is None else gradient_QN
        queries, n = scores_QN.shape
        loss_Q = scores_QN.new_empty(queries, dtype=torch.float32)
        lists, block = (1, min(1024, max(32, _power(n)))) if along == 1 else (8, 64)
        with _on(scores_QN):
            cross_entropy.info_nce[(-(-queries // lists),)](
                laid, positive, mask, out_QN, loss_Q, queries, n, down, along,
                1 / temperature, scale, MASKED=mask is not laid,
                BACKWARD=gradient_QN is not None, ADD=add, EACH=positives == "each",
                LISTS=lists, BLOCK=block, num_warps=4, num_stages=1,
            )  # fmt: skip
        return loss_Q

    return run


def kendall_rank(relevance_QN: Tensor, mask_QN: Mask, *, gap: float, margin: float) -> Run:
    """The kernels of the Kendall hinge over all pairs of these lists."""

    def run(
        scores_QN: Tensor, gradient_QN: Tensor | None, scale: float = 1.0, add: bool = False
    ) -> Tensor:
        laid, down, along = _laid(scores_QN, relevance_QN, mask_QN)
        scores, relevance, mask = laid
        masked = mask is not scores
        queries, n = scores_QN.shape
        block, others = 64, 32
        by = queries, -(-n // block)
        difference_QN = scores.new_empty(queries, n, dtype=torch.int32)
        sums_QT = scores.new_empty(by, dtype=torch.float64)
        pairs_QT = scores.new_empty(by, dtype=torch.int64)
        shape = queries, n, down, along
        with _on(scores):
            hinge_pairs.count[by](
                scores, relevance, mask, difference_QN, sums_QT, pairs_QT, *shape, gap, margin,
                MASKED=masked, BLOCK=block, OTHERS=others, num_warps=4, num_stages=1,
            )  # fmt: skip
            pairs_Q = pairs_QT.sum(1).clamp(min=1)
            sum_Q = sums_QT.sum(1)
            if gradient_QN is not None:
                factor_Q = torch.where(sum_Q.isnan(), torch.nan, scale / pairs_Q).float()
                hinge_pairs.slope[queries, -(-n // 1024)](
                    scores, mask, difference_QN, factor_Q, gradient_QN, *shape,
                    MASKED=masked, ADD=add, BLOCK=1024, num_warps=4, num_stages=1,
                )  # fmt: skip
        return (sum_Q.clamp(min=0) / pairs_Q).float()

    return run


def _laid(scores_QN: Tensor, *others: Mask) -> tuple[tuple[Tensor, ...], int, int]:
    """((scores, *others), entries from list to list, entries from candidate to candidate).

    All lie alike, by rows or by columns; booleans are bytes, and the scores stand for what is None.
    """
    queries, n = scores_QN.shape
    by_columns = not scores_QN.is_contiguous() and scores_QN.T.is_contiguous()
    laid: list[Tensor] = []
    for x in (scores_QN.detach(), *others):
        if x is not None:
            x = x.T.contiguous().T if by_columns else x.contiguous()
            x = x.view(torch.uint8) if x.dtype == torch.bool else x
        laid.append(laid[0] if x is None else x)
    return tuple(laid), *((1, queries) if by_columns else (n, 1))


def _power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(0, n - 1).bit_length()


def _tiles(width: float, cells: int) -> int:
    """Tiles of a grid for lists `width` x tau wide: a power of two within TILES."""
    few, many = TILES
    wanted = width * cells + 8
    return many if wanted > many * TILE else max(few, _power(math.ceil(wanted / TILE)))


def _programs(blocks: int, like: Tensor, on_each: int) -> int:
    """Programs at a time: what the device runs at once, fewer if there is less to do."""
    if like.device.type == "cpu":
        return min(blocks, 3)  # so that a test's programs take several lists, too
    return min(blocks, on_each * _processors(like.device))


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one: kernels start there, on its current stream."""
    return torch.cuda.device_of(like) if like.is_cuda else contextlib.nullcontext()


@functools.lru_cache(maxsize=16)
def _table(cells: int, reach: int, device: torch.device) -> Tensor:
    """The step from -(reach + 1) tiles to as many above, a value a cell."""
    return steps(cells, (reach + 1) * TILE).to(device, torch.float32)


@functools.lru_cache(maxsize=16)
def _discounts(n: int, device: torch.device) -> Tensor:
    """The sums of the first 0, 1, ... n discounts, 1 / log(place + 1)."""
    place = torch.arange(1, n + 2, dtype=torch.float64, device=device)
    discount = 1 / place.log()
    discount[0] = 0
    return discount.cumsum(0)
