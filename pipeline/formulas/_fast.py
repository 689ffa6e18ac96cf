"""The passes of the binned smooth rank compiled by numba, for float32 on a CPU: optional.

The same arithmetic as `_binned.Grid`, with a score's four cells done at once in place of one pass
for each. Numbers are wrapped in float32, or the compiler would work in float64.

Legend of the shape suffixes: R rows, N candidates, G grid cells.
"""

from numba import float32, njit

from pipeline.formulas._binned import Grid

compiled = njit(cache=True, nogil=True, fastmath={"nsz", "arcp", "contract", "reassoc"})
within = njit(inline="always")


class FastGrid(Grid):
    """`Grid` with compiled passes over the scores; the matrix product stays torch's."""

    def _buffers(self, shape, like_QN):
        self.cell_RN = like_QN.new_empty(shape).int().numpy()
        self.offset_RN, self.slope_RN = like_QN.new_empty(2, *shape).numpy()
        self.everything_RN = like_QN.new_ones(shape).bool().numpy()

    def rank(self, scores_RN, mask_RN, out_RN):
        """As that of `Grid`."""
        rows = len(scores_RN)
        self.padded, self.convolved = self.padded_RG[:rows], self.convolved_RG[:rows]
        self.mask = self.everything_RN[:rows] if mask_RN is None else mask_RN.numpy()
        place_RN = scores_RN.sub(scores_RN.amin(-1, keepdim=True)).mul_(self.scale).numpy()
        _spread(place_RN, self.mask, self._emptied().numpy(), self.cell_RN, self.offset_RN)
        self._convolve(self.band_LL, from_top=True)
        grid_RG = self.convolved.numpy()
        _read(grid_RG, self.cell_RN, self.offset_RN, out_RN.numpy(), self.slope_RN)
        return out_RN

    def gradient(self, grad_RN, mask_RN, out_RN):
        """As that of `Grid`."""
        grad_RN, place = grad_RN.numpy(), (self.cell_RN, self.offset_RN)
        _spread_again(grad_RN, self.mask, self._emptied().numpy(), *place)
        self._convolve(self.band_LL.flip(0, 1), from_top=False)
        kept = (self.slope_RN, grad_RN, self.mask)
        _read_slope(self.convolved.numpy(), *place, *kept, out_RN.numpy())
        return out_RN.mul_(self.scale)


@compiled
def _spread(place_RN, mask_RN, grid_RG, cell_RN, offset_RN):
    for r in range(place_RN.shape[0]):
        for j in range(place_RN.shape[1]):
            c = int(place_RN[r, j])
            x = place_RN[r, j] - float32(c)
            cell_RN[r, j] = c
            offset_RN[r, j] = x
            if mask_RN[r, j]:
                _add(grid_RG, r, c, x, float32(1))


@compiled
def _spread_again(amount_RN, mask_RN, grid_RG, cell_RN, offset_RN):
    for r in range(amount_RN.shape[0]):
        for j in range(amount_RN.shape[1]):
            if mask_RN[r, j]:
                _add(grid_RG, r, cell_RN[r, j], offset_RN[r, j], amount_RN[r, j])


@within
def _add(grid_RG, r, c, x, amount):
    """amount x the four weights of the cubic B-spline at x past the second of the cells from c."""
    y = float32(1) - x
    sixth = amount * float32(1 / 6)
    first, last = sixth * y * y * y, sixth * x * x * x
    second = sixth * (float32(4) + x * x * (float32(3) * x - float32(6)))
    grid_RG[r, c] += first
    grid_RG[r, c + 1] += second
    grid_RG[r, c + 2] += amount - first - second - last
    grid_RG[r, c + 3] += last


@within
def _slope(a, b, c, d, x):
    """The derivative at x past b of the spline through four cells: their differences, weighted."""
    y = float32(1) - x
    half = float32(0.5)
    return (d - b) * x * x * half + (c - a) * y * y * half + (c - b) * float32(2) * x * y


@compiled
def _read(grid_RG, cell_RN, offset_RN, rank_RN, slope_RN):
    for r in range(rank_RN.shape[0]):
        for j in range(rank_RN.shape[1]):
            i, x = cell_RN[r, j], offset_RN[r, j]
            a, b, c, d = grid_RG[r, i], grid_RG[r, i + 1], grid_RG[r, i + 2], grid_RG[r, i + 3]
            y, sixth = float32(1) - x, float32(1 / 6)
            first, last = sixth * y * y * y, sixth * x * x * x
            second = sixth * (float32(4) + x * x * (float32(3) * x - float32(6)))
            third = float32(1) - first - second - last
            rank_RN[r, j] = first * a + second * b + third * c + last * d + float32(0.5)
            slope_RN[r, j] = _slope(a, b, c, d, x)


@compiled
def _read_slope(grid_RG, cell_RN, offset_RN, slope_RN, grad_RN, mask_RN, out_RN):
    for r in range(out_RN.shape[0]):
        for j in range(out_RN.shape[1]):
            i, x = cell_RN[r, j], offset_RN[r, j]
            a, b, c, d = grid_RG[r, i], grid_RG[r, i + 1], grid_RG[r, i + 2], grid_RG[r, i + 3]
            both = slope_RN[r, j] * grad_RN[r, j] + _slope(a, b, c, d, x)
            out_RN[r, j] = both if mask_RN[r, j] else float32(0)
