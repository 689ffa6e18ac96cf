"""The binned smooth rank, ordering rows and counting inversions, compiled by numba: optional.

On a CPU; ranks in float32 only, by the same arithmetic as `_binned.Grid`, with a score's four cells
done at once in place of one pass for each. Numbers are wrapped in float32, or the compiler would
work in float64.

Legend of the shape suffixes: R rows, Q queries, N candidates, G grid cells.
"""

import torch
from numba import float32, njit

from pipeline.formulas.kernels.binned import Grid

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
    """Amount x the four weights of the cubic B-spline at x past the second of the cells from c."""
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


def order_of_rows(key_QN):
    """order_QN by integers, as `_sort.order_of_rows`."""
    order_QN = torch.empty(key_QN.shape, dtype=torch.int64)
    kind = torch.iinfo(key_QN.dtype)
    counts = torch.empty(-(-kind.bits // 11), 2048, dtype=torch.int64).numpy()
    place_2N = torch.empty(2, key_QN.shape[1], dtype=torch.int32).numpy()
    # From here on 0 is the lowest key.
    _order((key_QN ^ kind.min).numpy(), counts, place_2N, order_QN.numpy())
    return order_QN


@compiled
def _order(key_QN, start, place, order_QN):
    """A radix sort, 11 bits at a time: stable, and linear in the length."""
    n = key_QN.shape[1]
    for q in range(key_QN.shape[0]):
        key = key_QN[q]
        start[:] = 0
        for j in range(n):
            place[0, j] = j
            for digit in range(len(start)):
                start[digit, (key[j] >> (11 * digit)) & 2047] += 1
        source = 0
        for digit in range(len(start)):
            first = (key[0] >> (11 * digit)) & 2047
            if start[digit, first] == n:
                continue  # all have the same
            # Counts become the place where each digit's keys begin.
            below = 0
            for cell in range(2048):
                count = start[digit, cell]
                start[digit, cell] = below
                below += count
            # Deal the keys out to them, in the order of the digits before.
            for j in range(n):
                p = place[source, j]
                cell = (key[p] >> (11 * digit)) & 2047
                place[1 - source, start[digit, cell]] = p
                start[digit, cell] += 1
            source = 1 - source
        for j in range(n):
            order_QN[q, j] = place[source, j]


def dcg(scores_QN, order_QN, gain_QN, before_N):
    """dcg_Q: gains in an order by score, each tie at the mean discount of its places.

    `before_N` is the sum of the discounts before a place; the order ends where it rises no more.
    """
    total_Q = torch.empty(len(scores_QN), dtype=torch.float64)
    _dcg(*(x.numpy() for x in (scores_QN, order_QN, gain_QN, before_N, total_Q)))
    return total_Q


@compiled
def _dcg(scores_QN, order_QN, gain_QN, before_N, total_Q):
    n = scores_QN.shape[1]
    for q in range(len(total_Q)):
        total, start = 0.0, 0
        while start < n and before_N[start] < before_N[n]:
            first = order_QN[q, start]
            end, gain = start + 1, gain_QN[q, first]
            while end < n and scores_QN[q, order_QN[q, end]] == scores_QN[q, first]:
                gain += gain_QN[q, order_QN[q, end]]
                end += 1
            # The tie's gain, at the mean discount of the places it takes.
            total += gain * (before_N[end] - before_N[start]) / (end - start)
            start = end
        total_Q[q] = total


def inversions(rank_QN):
    """inversions_Q, as `_pairs.inversions`."""
    runs_2N = torch.empty(2, rank_QN.shape[1], dtype=torch.int32).numpy()
    total_Q = torch.empty(len(rank_QN), dtype=torch.int64)
    _inversions(rank_QN.numpy(), runs_2N, total_Q.numpy())
    return total_Q


@compiled
def _inversions(rank_QN, runs, total_Q):
    """A merge sort: of the left run, what is left over stands above the member that comes next."""
    n = rank_QN.shape[1]
    for q in range(rank_QN.shape[0]):
        for j in range(n):
            runs[0, j] = rank_QN[q, j]
        source, half, total = 0, 1, 0
        while half < n:
            for start in range(0, n, 2 * half):
                middle, end = min(start + half, n), min(start + 2 * half, n)
                i, j = start, middle
                while i < middle and j < end:  # without a branch that could go either way
                    left, right = runs[source, i], runs[source, j]
                    of_right = int(right < left)
                    runs[1 - source, i + j - middle] = min(left, right)
                    total += of_right * (middle - i)
                    i, j = i + 1 - of_right, j + of_right
                for rest in range(i, middle):
                    runs[1 - source, rest + end - middle] = runs[source, rest]
                for rest in range(j, end):
                    runs[1 - source, rest] = runs[source, rest]
            source, half = 1 - source, 2 * half
        total_Q[q] = total
