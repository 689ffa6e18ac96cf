"""Smooth ranks on a grid: O(N + grid) per query in place of O(N^2), with an error one can choose.

The smooth rank of x, the sum over k of sigmoid((s_k - x) / tau), is the scores' distribution
convolved with a logistic step. So every score is spread over a uniform grid by the four weights of
a cubic B-spline, each row of the grid goes through one banded matrix, and the rank is read off with
the same four weights. The band holds the logistic step with the two splines divided out of its
spectrum; further than REACH x tau from a score the step is 0 or 1 and a running sum does it. The
gradient is the same two passes with the splines' derivative.

Legend of the shape suffixes: R rows, N candidates, G grid cells, T tiles of the grid, L cells of a
tile; 4 is the cells that one score touches.
"""

import functools
import math

import torch

REACH = 20  # in tau: beyond it the step differs from 0 or 1 by less than exp(-20) = 2e-9
# A candidate's share of a rank is off by at most this much of itself over cells^4: the cubic
# spline is of fourth order.
ERROR_AT_ONE_CELL = 3e-3


def cells_per_tau(error):
    """Grid cells per tau, at least 3, for a relative error of `error` in the rank.

    >>> cells_per_tau(4e-5), cells_per_tau(1e-6)
    (3, 8)
    """
    return max(3, math.ceil((ERROR_AT_ONE_CELL / error) ** 0.25))


def grid_length(scores_QN, tau, cells):
    """Cells that the widest row of scores needs; inf when a score is not finite."""
    width = (scores_QN.amax(-1) - scores_QN.amin(-1)).max().item() / tau * cells
    return int(width) + 4 if math.isfinite(width) else math.inf


class Grid:
    """Workspace for blocks of up to `rows` rows.

    Fresh memory for every pass would cost more than the arithmetic.
    """

    def __init__(self, rows, like_QN, *, tau, cells, length):
        self.scale, self.tile = cells / tau, REACH * cells
        self.length = length
        self.band_LL = _band(cells, like_QN.dtype, like_QN.device)
        tiles = -(-(length + 3) // self.tile)
        self.padded_RG = like_QN.new_zeros(rows, (tiles + 2) * self.tile)
        self.convolved_RG = like_QN.new_empty(rows, tiles * self.tile)
        self._buffers((rows, like_QN.shape[1]), like_QN)

    def _buffers(self, shape, like_QN):
        self.cell_RN = like_QN.new_empty(shape, dtype=torch.int64)
        self.offset_RN, self.scratch_RN = like_QN.new_empty(2, *shape)
        self.weights_4RN, self.above_4RN = like_QN.new_empty(2, 4, *shape)

    def rank(self, scores_RN, mask_RN, out_RN):
        """Fills out_RN with 1/2 + the sum of the step over every k, itself included: at itself the
        step is exactly 1/2."""
        self._take(len(scores_RN))
        torch.sub(scores_RN, scores_RN.amin(-1, keepdim=True), out=self.offset).mul_(self.scale)
        torch.floor(self.offset, out=self.scratch)
        self.cell.copy_(self.scratch)
        self.offset.sub_(self.scratch)
        self._cubic()
        self._spread(mask_RN)
        self._convolve(self.band_LL, from_top=True)
        for shift in range(4):
            torch.gather(self._window(self.convolved, shift), 1, self.cell, out=self.above[shift])
        torch.mul(self.above[0], self.weights[0], out=out_RN)
        for value_RN, weight_RN in zip(self.above[1:], self.weights[1:], strict=True):
            out_RN.addcmul_(value_RN, weight_RN)
        return out_RN.add_(0.5)

    def gradient(self, grad_RN, mask_RN, out_RN):
        """Fills out_RN with d(sum of grad x rank) / d(scores) for the block that `rank` saw
        last."""
        if mask_RN is not None:
            grad_RN = grad_RN * mask_RN
        self._spread(grad_RN)
        self._convolve(self.band_LL.flip(0, 1), from_top=False)
        self._cubic_slope()
        out_RN.zero_()
        for shift in range(4):
            torch.gather(self._window(self.convolved, shift), 1, self.cell, out=self.scratch)
            if mask_RN is not None:
                self.scratch.mul_(mask_RN)
            self.scratch.addcmul_(self.above[shift], grad_RN)
            out_RN.addcmul_(self.scratch, self.weights[shift])
        return out_RN.mul_(self.scale)

    def _take(self, rows):
        """Views of the workspace for a block of `rows` rows: the last block may be smaller."""
        self.cell, self.offset, self.scratch = (
            self.cell_RN[:rows],
            self.offset_RN[:rows],
            self.scratch_RN[:rows],
        )
        self.weights, self.above = self.weights_4RN[:, :rows], self.above_4RN[:, :rows]
        self.padded, self.convolved = self.padded_RG[:rows], self.convolved_RG[:rows]

    def _window(self, grid_RG, shift):
        """Where cell c stands for the cell c + shift: one index serves the four cells that a score
        touches."""
        return grid_RG.narrow(1, shift, self.length)

    def _cubic(self):
        """The four weights of the cubic B-spline at `offset` in [0, 1) past the second of its
        cells."""
        first, second, third, last = self.weights
        torch.sub(1, self.offset, out=self.scratch)
        torch.mul(self.scratch, self.scratch, out=first).mul_(self.scratch).div_(6)
        torch.mul(self.offset, self.offset, out=second)
        torch.mul(second, self.offset, out=last).div_(6)
        torch.mul(last, 3, out=third)
        torch.sub(third, second, out=second).add_(2 / 3)
        torch.sub(1, first, out=third).sub_(second).sub_(last)

    def _cubic_slope(self):
        """The derivatives of those weights, in their place."""
        first, second, third, last = self.weights
        torch.sub(1, self.offset, out=first)
        first.mul_(first).mul_(-0.5)
        torch.mul(self.offset, self.offset, out=last).mul_(0.5)
        torch.mul(last, 3, out=second).sub_(self.offset, alpha=2)
        torch.add(first, second, out=third).add_(last).neg_()

    def _emptied(self):
        """The grid without the tile of zeros on either side, all zeros."""
        return self.padded[:, self.tile : -self.tile].zero_()

    def _spread(self, amount_RN):
        """Adds amount x weight of every score to the four cells it touches."""
        inner_RG = self._emptied()
        for shift, weight_RN in enumerate(self.weights):
            if amount_RN is not None:
                weight_RN = torch.mul(weight_RN, amount_RN, out=self.scratch)
            self._window(inner_RG, shift).scatter_add_(1, self.cell, weight_RN)

    def _convolve(self, band_LL, *, from_top):
        """The step from all cells to each: the band from its own tile and the two beside it, all or
        nothing beyond."""
        rows, tile = len(self.padded), self.tile
        near_RTL = self.convolved.view(rows, -1, tile)
        torch.mm(
            self.padded.unfold(1, 3 * tile, tile).reshape(-1, 3 * tile),
            band_LL,
            out=near_RTL.view(-1, tile),
        )
        sums_RT = self.padded[:, tile:-tile].view(rows, -1, tile).sum(-1)
        if from_top:
            rest_RT = sums_RT[:, 2:].flip(1).cumsum(1).flip(1)
            near_RTL[:, :-2].add_(rest_RT[:, :, None])
        else:
            rest_RT = sums_RT[:, :-2].cumsum(1)
            near_RTL[:, 2:].add_(rest_RT[:, :, None])


@functools.lru_cache(maxsize=16)
def _band(cells, dtype, device):
    """band_LL (3 tiles x 1 tile): the step from the cells of three tiles to those of the middle
    one.

    The difference of neighbouring steps has the spectrum logistic(w) x sinc(w/2) / sinc(w/2)^8,
    shifted by half a cell; it is smooth and vanishes before the grid's highest frequency, so a
    plain sum over frequencies is exact.
    """
    tile = REACH * cells
    count = 16 * tile
    w = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
    argument = math.pi * cells * w
    spectrum = 2 * argument * torch.exp(-argument) / -torch.expm1(-2 * argument)
    spectrum = spectrum * torch.sinc(w / (2 * math.pi)) ** -7
    n = torch.arange(-2 * tile, 2 * tile, dtype=torch.float64)
    step = (torch.cos((n[:, None] - 0.5) * w) @ spectrum / count).cumsum(0)
    step = torch.where(n < 0, step, 1 - step.flip(0).roll(1))  # exactly step(n) + step(-n) = 1
    step[2 * tile] = 0.5
    source, target = torch.arange(3 * tile)[:, None] - tile, torch.arange(tile)[None, :]
    return step[source - target + 2 * tile].to(device, dtype)
