"""The best DCG that a list can have, in Triton: by sorting, or for long lists from two histograms.

The first histogram, of 1,024 even bins of the gain, says where the gains lie. The second has 2,048
bins, shared out among the first's by how many gains they hold and by how much the discount falls
there; a bin's gains take the mean discount of its places. Within 1e-6 of the sum of sorted gains
for the distributions of `tests/pipeline/formulas/kernels_in_triton.py`.

Legend of the shape suffixes: L lists, N candidates of a block, K and F bins of the first and the
second histogram.
"""

import triton
import triton.language as tl

from pipeline.formulas.kernels.fused.tiles import graded, places

BINS = tl.constexpr(1024)
FINE = tl.constexpr(2048)
COUNT = tl.constexpr(42)  # a bin's count stands above this bit, the sum of its gains below


@triton.jit
def of_sorted(scores, relevance, mask, list_L, Q, N, down, along,
              MASKED: tl.constexpr, SORT: tl.constexpr):  # fmt: skip
    """ideal_L of lists of up to SORT candidates, a power of two."""
    candidate = tl.arange(0, SORT)
    there = (list_L < Q)[:, None] & (candidate < N)[None, :]
    place = places(list_L, candidate, down, along)
    _, gain, inside, _ = graded(scores, relevance, mask, place, there, MASKED)
    count_L = tl.sum(inside.to(tl.int32), 1)
    gain = tl.sort(tl.where(inside, gain, -float("inf")), descending=True)
    discount = 1 / tl.log(candidate.to(tl.float32) + 2)
    return tl.sum(tl.where(candidate[None, :] < count_L[:, None], gain * discount[None, :], 0.0), 1)


@triton.jit
def bin_of(gain_LN, floor_L, scale_L):
    """(bin_LN, how far in it_LN in [0, 1]) of the first histogram."""
    place = (gain_LN - floor_L[:, None]) * scale_L[:, None]
    number = tl.minimum(place.to(tl.int32), BINS - 1)
    return number, place - number.to(tl.float32)


@triton.jit
def share_out(coarse):
    """Puts the bins of the second histogram in place of a list's counts: the first + 4,096 x many.

    A bin that holds something has at least one: 1,024 of those, 512 by counts and 512 by discount
    are 2,048 at most.
    """
    number = tl.arange(0, BINS)
    count = tl.load(coarse + number, cache_modifier=".cg")
    above = tl.cumsum(count, 0, reverse=True) - count
    total = tl.sum(count)
    falls = 1 / tl.log(above.to(tl.float32) + 2) - 1 / tl.log((above + count).to(tl.float32) + 2)
    share = count.to(tl.float32) / tl.maximum(total, 1) + falls / tl.maximum(tl.sum(falls), 1e-30)
    many = (share * ((FINE - BINS) // 2)).to(tl.int32) + (count > 0).to(tl.int32)
    tl.debug_barrier()  # all counts are read before the first is replaced
    tl.store(coarse + number, tl.cumsum(many, 0) - many + 4096 * many)


@triton.jit
def add_to_fine(coarse, fine, gain_LN, inside_LN, floor_L, scale_L, unit):
    """Adds 1 and the gain to a bin of the second histogram, both in one 64-bit number.

    The gain counts from the list's least, in `unit`s of 1 / BINS of their range; N x BINS x unit is
    at most 2^41, so that the sum, roundings included, stays below bit 42.
    """
    number, within = bin_of(gain_LN, floor_L, scale_L)
    packed = tl.load(coarse + number, mask=inside_LN, other=4096)
    many = packed // 4096
    step = tl.minimum((within * many.to(tl.float32)).to(tl.int32), many - 1)
    at = fine + (packed % 4096) + tl.maximum(step, 0)
    value = (gain_LN - floor_L[:, None]) * scale_L[:, None] * unit
    one = tl.full(value.shape, 1, tl.int64) << COUNT
    tl.atomic_add(at, one + tl.floor(value + 0.5).to(tl.int64), mask=inside_LN,
                  sem="relaxed", scope="cta")  # fmt: skip


@triton.jit
def of_fine(fine, discounts, floor, scale, unit):
    """The ideal DCG of a list; `discounts` are the sums of the first n, in float64."""
    packed = tl.load(fine + tl.arange(0, FINE), cache_modifier=".cg")
    count = (packed >> COUNT).to(tl.int32)
    gain = (packed - (count.to(tl.int64) << COUNT)).to(tl.float64)
    above = tl.cumsum(count, 0, reverse=True) - count
    falls = tl.load(discounts + above + count) - tl.load(discounts + above)
    sums = tl.sum(gain * falls / tl.maximum(count, 1))
    lowest = floor * tl.load(discounts + tl.sum(count))
    return (sums / (scale * unit).to(tl.float64) + lowest).to(tl.float32)
