"""Smooth ranks on a grid: O(N + grid) per query in place of O(N^2), with an error one can choose.

The smooth rank of x, the sum over k of sigmoid((s_k - x) / tau), is the scores' distribution
convolved with a logistic step. So every score is spread over a uniform grid by the four weights of
a cubic B-spline, each row of the grid goes through one banded matrix, and the rank is read off with
the same four weights. The band holds the logistic step with the two splines divided out of its
spectrum; further than REACH x tau from a score the step is 0 or 1 and a running sum does it. The
gradient is the same two passes with the splines' derivative.

The weights are cubic in a score's offset in its cell, so what is kept of a cell is the sum of the
offsets' powers, and SPLINE makes weights of them cell by cell: there are fewer cells than scores.

Legend of the shape suffixes: R rows, N candidates, G grid cells, T tiles of the grid, L cells of a
tile; 4 is the cells that one score touches, or the powers of its offset.
"""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.formulas.kernels import Mask

REACH = 20  # in tau: beyond it the step differs from 0 or 1 by less than exp(-20) = 2e-9
# A candidate's share of a rank is off by at most this much of itself over cells^4: the cubic
# spline is of fourth order.
ERROR_AT_ONE_CELL = 3e-3
# The weight of each of the four cells, by powers of the offset x in [0, 1) past the second of them.
SPLINE = torch.tensor([[1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1]]).double() / 6


def cells_per_tau(error: float) -> int:
    """Grid cells per tau, at least 3, for a relative error of `error` in the rank.

    >>> cells_per_tau(4e-5), cells_per_tau(1e-6)
    (3, 8)
    """
    return max(3, math.ceil(math.pow(ERROR_AT_ONE_CELL / error, 0.25)))


def grid_length(scores_QN: Tensor, tau: float, cells: int, widest: float | None = None) -> float:
    """Cells that the widest row of scores needs; inf when a score is not finite.

    Where it is known how wide that can be, the scores are not looked at.
    """
    if widest is None:
        widest = (scores_QN.amax(-1) - scores_QN.amin(-1)).max().item()
    width = widest / tau * cells
    return int(width) + 4 if math.isfinite(width) else math.inf


class Grid:
    """Workspace for blocks of up to `rows` rows.

    Fresh memory for every pass would cost more than the arithmetic. `bounded` says that the length
    was not taken from the scores: then a row that is too wide for it is NaN.
    """

    def __init__(
        self,
        rows: int,
        like_QN: Tensor,
        *,
        tau: float,
        cells: int,
        length: int,
        bounded: bool = False,
    ):
        self.bounded = bounded
        self.scale, self.tile = cells / tau, REACH * cells
        self.length = length
        self.band_LL = _band(cells, like_QN.dtype, like_QN.device)
        tiles = -(-(length + 3) // self.tile)
        self.padded_RG = like_QN.new_zeros(rows, (tiles + 2) * self.tile)
        self.convolved_RG = like_QN.new_empty(rows, tiles * self.tile)
        self._buffers((rows, like_QN.shape[1]), like_QN)

    def _buffers(self, shape: tuple[int, int], like_QN: Tensor) -> None:
        self.cell_RN = like_QN.new_empty(shape, dtype=torch.int64)
        self.whole_RN = like_QN.new_empty(shape, dtype=torch.int32)
        self.powers_4RN = like_QN.new_ones(4, *shape)
        self.scratch_RN, self.slope_RN = like_QN.new_empty(2, *shape)
        self.spline_44 = SPLINE.to(like_QN)
        self.cells_4RG, self.mixed_4RG = like_QN.new_empty(2, 4, shape[0], self.length)

    def rank(self, scores_RN: Tensor, mask_RN: Mask, out_RN: Tensor) -> Tensor:
        """Fills out_RN with 1/2 + the sum of the step over every k, itself included.

        At itself the step is exactly 1/2.
        """
        self._take(len(scores_RN))
        one, x, square, cube = self.powers
        # Each score's cell, and the powers of its offset in it.
        torch.sub(scores_RN, scores_RN.amin(-1, keepdim=True), out=x).mul_(self.scale)
        offset: float | Tensor = 0.5
        if self.bounded:
            last = self.length - 4
            offset = torch.where(x.amax(-1, keepdim=True) <= last + 1, 0.5, torch.nan)
            x.nan_to_num_(0.0).clamp_(max=last)
        self.cell.copy_(self.whole.copy_(x))  # twice as fast as at once
        x.frac_()
        if mask_RN is not None:
            x.mul_(one.copy_(mask_RN))
        torch.mul(x, x, out=square)
        torch.mul(square, x, out=cube)
        # Onto the grid, through the step, and a polynomial a cell to read it off.
        self._spread(self.powers)
        self._convolve(self.band_LL, from_top=True)
        self._polynomials(self.spline_44)
        # The cubic and its slope by Horner's rule.
        top, slope = self._read(3, cube), self.slope
        torch.addcmul(self._read(2, square), top, x, out=square)
        torch.addcmul(square, top, x, out=slope)
        torch.addcmul(self._read(1, cube), square, x, out=cube)
        torch.addcmul(cube, slope, x, out=slope)
        return torch.addcmul(self._read(0, out_RN), cube, x, out=out_RN).add_(offset)

    def gradient(self, grad_RN: Tensor, mask_RN: Mask, out_RN: Tensor) -> Tensor:
        """Fills out_RN with d(sum of grad x rank) / d(scores) of the block that `rank` saw last."""
        if mask_RN is not None:
            grad_RN = grad_RN * mask_RN
        _, x, square, cube = self.powers
        # Each score as target: its gradient goes onto the grid and through the step turned over.
        torch.mul(grad_RN, x, out=self.scratch)
        torch.mul(self.scratch, x, out=square)
        torch.mul(square, x, out=cube)
        self._spread((grad_RN, self.scratch, square, cube))
        self._convolve(self.band_LL.flip(0, 1), from_top=False)
        self._polynomials(self.spline_44 * torch.arange(4, device=x.device))
        # Each score as source: the derivative of its cell's polynomial.
        top = self._read(3, cube)
        torch.addcmul(self._read(2, square), top, x, out=square)
        torch.addcmul(self._read(1, out_RN), square, x, out=out_RN)
        if mask_RN is not None:
            out_RN.mul_(mask_RN)
        return out_RN.addcmul_(self.slope, grad_RN).mul_(self.scale)

    def _take(self, rows: int) -> None:
        """Views of the workspace for a block of `rows` rows: the last block may be smaller."""
        self.cell, self.whole = self.cell_RN[:rows], self.whole_RN[:rows]
        self.scratch = self.scratch_RN[:rows]
        self.slope, self.powers = self.slope_RN[:rows], self.powers_4RN[:, :rows]
        self.padded, self.convolved = self.padded_RG[:rows], self.convolved_RG[:rows]

    def _spread(self, amounts: Iterable[Tensor]) -> None:
        """Adds every score's amounts, times the powers of its offset, to the grid by splines."""
        # Sums by cell, a power at a time, then the spline's weights of them, each a cell further.
        sums_4RG = self.cells_4RG[:, : len(self.cell)].zero_()
        for sum_RG, amount_RN in zip(sums_4RG, amounts, strict=True):
            sum_RG.scatter_add_(1, self.cell, amount_RN)
        inner_RG = self._emptied()
        for shift, mixed_RG in enumerate(self._mix(self.spline_44)):
            inner_RG.narrow(1, shift, self.length).add_(mixed_RG)

    def _polynomials(self, spline_44: Tensor) -> None:
        """Makes each cell's polynomial in the offset from the four cells there."""
        cells_RG4 = self.convolved.unfold(1, 4, 1)[:, : self.length]
        self.cells_4RG[:, : len(self.cell)].copy_(cells_RG4.permute(2, 0, 1))
        self.polynomial_4RG = self._mix(spline_44.T)

    def _mix(self, spline_44: Tensor) -> Tensor:
        torch.mm(spline_44, self.cells_4RG.flatten(1), out=self.mixed_4RG.flatten(1))
        mixed_4RG: Tensor = self.mixed_4RG[:, : len(self.cell)]
        return mixed_4RG

    def _read(self, power: int, out_RN: Tensor) -> Tensor:
        """The coefficient of that power in every score's cell."""
        return torch.gather(self.polynomial_4RG[power], 1, self.cell, out=out_RN)

    def _emptied(self) -> Tensor:
        """The grid without the tile of zeros on either side, all zeros."""
        return self.padded[:, self.tile : -self.tile].zero_()

    def _convolve(self, band_LL: Tensor, *, from_top: bool) -> None:
        """The step from all cells to each: the band from three tiles, all or nothing beyond."""
        rows, tile = len(self.padded), self.tile
        # Of a tile and those beside it: one product with the band.
        near_RTL = self.convolved.view(rows, -1, tile)
        three = self.padded.unfold(1, 3 * tile, tile).reshape(-1, 3 * tile)
        torch.mm(three, band_LL, out=near_RTL.view(-1, tile))
        # Of the tiles beyond: each score in them counts 1 on one side, 0 on the other.
        sums_RT = self.padded[:, tile:-tile].view(rows, -1, tile).sum(-1)
        if from_top:
            rest_RT = sums_RT[:, 2:].flip(1).cumsum(1).flip(1)
            near_RTL[:, :-2].add_(rest_RT[:, :, None])
        else:
            rest_RT = sums_RT[:, :-2].cumsum(1)
            near_RTL[:, 2:].add_(rest_RT[:, :, None])


@functools.lru_cache(maxsize=16)
def _band(cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """band_LL (3 tiles x 1 tile): the step from the cells of three tiles to the middle one's."""
    tile = REACH * cells
    source, target = torch.arange(3 * tile)[:, None] - tile, torch.arange(tile)[None, :]
    return steps(cells, 2 * tile)[source - target + 2 * tile].to(device, dtype)


def steps(cells: int, length: int) -> Tensor:
    """The step from -length to length - 1 cells above, in float64: 0, rising to 1; 1/2 at 0.

    The difference of neighbouring steps has the spectrum logistic(w) x sinc(w/2) / sinc(w/2)^8,
    shifted by half a cell; it is smooth and vanishes before the grid's highest frequency, so a
    plain sum over frequencies is exact.
    """
    count = 16 * REACH * cells
    w = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    argument = math.pi * cells * w
    spectrum = 2 * argument * torch.exp(-argument) / -torch.expm1(-2 * argument)
    spectrum = spectrum * torch.sinc(w / (2 * math.pi)) ** -7
    n = torch.arange(-length, length, dtype=torch.float64)
    # The differences, summed up to the step.
    step = (torch.cos((n[:, None] - 0.5) * w) @ spectrum / count).cumsum(0)
    step = torch.where(n < 0, step, 1 - step.flip(0).roll(1))  # exactly step(n) + step(-n) = 1
    step[length] = 0.5
    return step
