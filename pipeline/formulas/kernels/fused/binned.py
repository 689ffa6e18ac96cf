"""S-NDCG and its gradient over a grid, in one Triton kernel.

`pipeline/formulas/kernels/binned.py` has the method.

A program takes LISTS lists at a time and goes through each three times: it spreads the scores over
a grid in whole numbers (so the sum has one value in whatever order), takes them through the step,
reads ranks off and spreads the gradient's weights in the same way, and reads the gradient off. What
the passes read again is in the device's caches: memory gives scores and relevance once and takes
the gradient once. Scratch belongs to a program, not to a list.

Overflow: a spline's four weights sum to 1, so the N scores of a list sum to `fixed` (2^30 for 32
bits, 2^50 for 64) plus half a unit per addend, below 2^31. The gradient's weights are gain /
(log^2(place) place), of places from 2 on at most gain / log(place) / 1.38; that sums to DCG / 1.38,
and DCG is at most the ideal one: over the ideal one they sum to 0.73 of `fixed`. With gains below 0
the sum of their sizes stands in for the ideal one.

Legend of the shape suffixes: L lists, N candidates of a block.
"""

import triton
import triton.language as tl

from pipeline.formulas.kernels.fused.ideal import (
    BINS,
    FINE,
    add_to_fine,
    bin_of,
    of_fine,
    of_sorted,
    share_out,
)
from pipeline.formulas.kernels.fused.tiles import convolve, give, graded, places, read_off, spread


@triton.jit
def smooth_ndcg(
    scores, relevance, mask, out, loss, ideal, wide,
    sums, above, below, coarse, fine, step, discounts,
    Q, N, down, along, cells, fixed, unit, alpha,
    MASKED: tl.constexpr, BACKWARD: tl.constexpr, ADD: tl.constexpr, SORT: tl.constexpr,
    LISTS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Fills loss, ideal, and out (+=) with alpha x gradient; `wide` says which lists it left out.

    `cells` per unit of score; a list wider than the grid is left to the kernel of pairs. The grids
    of TOGETHER lists go through the step as rows of one matrix.
    """
    number_L = tl.arange(0, LISTS)
    slot_L = tl.program_id(0).to(tl.int64) * LISTS + number_L
    G: tl.constexpr = TILES * 64
    sums_L, above_L, below_L = sums + slot_L * G, above + slot_L * G, below + slot_L * G
    for block in range(tl.program_id(0), tl.cdiv(Q, LISTS), tl.num_programs(0)):
        list_L = block * LISTS + number_L
        lists = (scores, relevance, mask, list_L, Q, N, down, along)
        low_L, high_L, floor_L, top_L, size_L, sound_L = _survey(*lists, MASKED, BLOCK)
        wide_L = ((high_L - low_L) * cells < G - 4) == 0
        scale_L = BINS / tl.where(top_L > floor_L, top_L - floor_L, 1.0)
        tl.debug_barrier()  # the lists before have been read off
        _empty(sums, coarse, fine, SORT, LISTS, G)
        tl.debug_barrier()
        _first(*lists, sums_L, coarse, slot_L, low_L, wide_L, floor_L, scale_L, cells, fixed / N,
               MASKED, SORT, BLOCK)  # fmt: skip
        tl.debug_barrier()
        if SORT > 0:
            ideal_L = of_sorted(*lists, MASKED, SORT)
        else:
            ideal_L = _of_bins(*lists, coarse, fine, discounts, slot_L, floor_L, scale_L, unit,
                               MASKED, LISTS, BLOCK)  # fmt: skip
        _convolve(sums, above, step, N / fixed, True, LISTS, TOGETHER, TILES, REACH)
        tl.debug_barrier()
        if BACKWARD:
            _empty(sums, coarse, fine, 1, LISTS, G)
            tl.debug_barrier()
        bound_L = tl.where(floor_L < 0, size_L, ideal_L)
        weight_L = fixed / tl.where(bound_L > 0, bound_L, 1.0)
        best_L = tl.where(ideal_L == 0, 1.0, ideal_L)
        dcg_L = _second(*lists, above_L, sums_L, low_L, wide_L, cells, weight_L,
                        MASKED, BACKWARD, BLOCK, G)  # fmt: skip
        loss_L = tl.where(ideal_L == 0, 0.0, 1 - dcg_L / best_L)
        there_L = list_L < Q
        tl.store(loss + list_L, tl.where(sound_L, loss_L, float("nan")), mask=there_L)
        tl.store(ideal + list_L, ideal_L, mask=there_L)
        tl.store(wide + list_L, wide_L.to(tl.int32), mask=there_L)
        if BACKWARD:
            tl.debug_barrier()
            _convolve(sums, below, step, 1.0, False, LISTS, TOGETHER, TILES, REACH)
            tl.debug_barrier()
            factor_L = tl.where(sound_L, alpha * cells, float("nan"))
            _third(*lists, out, above_L, below_L, low_L, wide_L, cells, factor_L / best_L,
                   factor_L / (weight_L * best_L), MASKED, ADD, BLOCK, G)  # fmt: skip


@triton.jit
def _survey(scores, relevance, mask, list_L, Q, N, down, along,
            MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The least and greatest score and gain of each list, sum |gain|, and whether all is finite."""
    # Kept candidate by candidate, and brought together once: that takes a barrier.
    none = tl.zeros((list_L.shape[0], BLOCK), tl.float32)
    lows, highs = none + float("inf"), none - float("inf")
    floors, tops = lows, highs
    sizes, wrongs = none, tl.zeros((list_L.shape[0], BLOCK), tl.int32)
    for start in range(0, N, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        there = (list_L < Q)[:, None] & (candidate < N)[None, :]
        place = places(list_L, candidate, down, along)
        score, gain, inside, wrong = graded(scores, relevance, mask, place, there, MASKED)
        lows = tl.where(inside, tl.minimum(lows, score), lows)
        highs = tl.where(inside, tl.maximum(highs, score), highs)
        floors = tl.where(inside, tl.minimum(floors, gain), floors)
        tops = tl.where(inside, tl.maximum(tops, gain), tops)
        sizes += tl.abs(gain)
        wrongs += wrong.to(tl.int32)
    low_L, high_L, floor_L, top_L = (
        tl.min(lows, 1),
        tl.max(highs, 1),
        tl.min(floors, 1),
        tl.max(tops, 1),
    )
    size_L, wrong_L = tl.sum(sizes, 1), tl.max(wrongs, 1)
    empty_L = low_L > high_L
    low_L, high_L = tl.where(empty_L, 0.0, low_L), tl.where(empty_L, 0.0, high_L)
    floor_L, top_L = tl.where(empty_L, 0.0, floor_L), tl.where(empty_L, 0.0, top_L)
    return low_L, high_L, floor_L, top_L, size_L, wrong_L == 0


@triton.jit
def _empty(sums, coarse, fine, SORT: tl.constexpr, LISTS: tl.constexpr, G: tl.constexpr):
    """Zeros for the program's own lists."""
    number = tl.arange(0, 1024)
    nothing = tl.zeros((1024,), tl.int32)
    for offset in range(LISTS):
        slot = tl.program_id(0).to(tl.int64) * LISTS + offset
        for start in tl.static_range(0, G, 1024):
            tl.store(sums + slot * G + start + number, nothing.to(sums.dtype.element_ty))
        if SORT == 0:
            tl.store(coarse + slot * BINS + number, nothing)
            for start in tl.static_range(0, FINE, 1024):
                tl.store(fine + slot * FINE + start + number, nothing.to(tl.int64))


@triton.jit
def _convolve(sums, grids, step, inverse, UP: tl.constexpr, LISTS: tl.constexpr,
              TOGETHER: tl.constexpr, TILES: tl.constexpr, REACH: tl.constexpr):  # fmt: skip
    """The program's own grids, from its sums, TOGETHER of them at once."""
    for number in range(0, LISTS, TOGETHER):
        own = (tl.program_id(0).to(tl.int64) * LISTS + number) * TILES * 64
        convolve(sums + own, grids + own, step, inverse, UP, TOGETHER * TILES, TILES, REACH)


@triton.jit
def _cell(score_LN, low_L, cells):
    """(cell_LN, offset_LN in [0, 1)) of scores on their list's grid."""
    place = (score_LN - low_L[:, None]) * cells
    cell = place.to(tl.int32)
    return cell, place - cell.to(tl.float32)


@triton.jit
def _first(scores, relevance, mask, list_L, Q, N, down, along, sums_L, coarse, slot_L,
           low_L, wide_L, floor_L, scale_L, cells, weight,
           MASKED: tl.constexpr, SORT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The scores onto the grid, and the gains into the first histogram."""
    for start in range(0, N, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        there = (list_L < Q)[:, None] & (candidate < N)[None, :]
        place = places(list_L, candidate, down, along)
        score, gain, inside, _ = graded(scores, relevance, mask, place, there, MASKED)
        cell, offset = _cell(score, low_L, cells)
        amount = tl.where(inside, weight, 0.0)
        spread(sums_L[:, None], cell, offset, amount, inside & (wide_L == 0)[:, None])
        if SORT == 0:
            number, _ = bin_of(gain, floor_L, scale_L)
            one = tl.full(number.shape, 1, tl.int32)
            tl.atomic_add(coarse + slot_L[:, None] * BINS + number, one, mask=inside,
                          sem="relaxed", scope="cta")  # fmt: skip


@triton.jit
def _of_bins(scores, relevance, mask, list_L, Q, N, down, along, coarse, fine, discounts,
             slot_L, floor_L, scale_L, unit,
             MASKED: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ideal_L from the first histogram, by way of the second."""
    for number in range(LISTS):
        share_out(coarse + (tl.program_id(0).to(tl.int64) * LISTS + number) * BINS)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        there = (list_L < Q)[:, None] & (candidate < N)[None, :]
        place = places(list_L, candidate, down, along)
        _, gain, inside, _ = graded(scores, relevance, mask, place, there, MASKED)
        own = slot_L[:, None]
        add_to_fine(coarse + own * BINS, fine + own * FINE, gain, inside, floor_L, scale_L, unit)
    tl.debug_barrier()
    ideal_L = floor_L * 0
    for number in range(LISTS):
        slot = tl.program_id(0).to(tl.int64) * LISTS + number
        this_L = tl.arange(0, LISTS) == number
        floor = tl.sum(tl.where(this_L, floor_L, 0.0))
        scale = tl.sum(tl.where(this_L, scale_L, 0.0))
        ideal_L = tl.where(
            this_L, of_fine(fine + slot * FINE, discounts, floor, scale, unit), ideal_L
        )
    return ideal_L


@triton.jit
def _second(scores, relevance, mask, list_L, Q, N, down, along, above_L, sums_L,
            low_L, wide_L, cells, weight_L,
            MASKED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
            G: tl.constexpr):  # fmt: skip
    """dcg_L, its ranks read off; the gradient's weights onto the grid."""
    dcg = tl.zeros((list_L.shape[0], BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        there = (list_L < Q)[:, None] & (candidate < N)[None, :]
        place = places(list_L, candidate, down, along)
        score, gain, inside, _ = graded(scores, relevance, mask, place, there, MASKED)
        inside = inside & (wide_L == 0)[:, None]
        cell, offset = _cell(score, low_L, cells)
        above, _ = read_off(above_L[:, None], cell, offset, inside)
        at = above + 1.5  # 1 + the rank, which is 1/2 + the sum over all, itself included
        log = tl.log(at)
        share = tl.where(inside, gain / log, 0.0)
        dcg += share
        if BACKWARD:
            spread(sums_L[:, None], cell, offset, share / (log * at) * weight_L[:, None], inside)
    return tl.sum(dcg, 1)


@triton.jit
def _third(scores, relevance, mask, list_L, Q, N, down, along, out, above_L, below_L,
           low_L, wide_L, cells, as_target_L, as_source_L,
           MASKED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
           G: tl.constexpr):  # fmt: skip
    """The gradient: as target by the slope of its own rank, as source by that of all others'."""
    for start in range(0, N, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        there = (list_L < Q)[:, None] & (candidate < N)[None, :]
        place = places(list_L, candidate, down, along)
        score, gain, inside, _ = graded(scores, relevance, mask, place, there, MASKED)
        here = inside & (wide_L == 0)[:, None]
        cell, offset = _cell(score, low_L, cells)
        above, slope = read_off(above_L[:, None], cell, offset, here)
        at = above + 1.5
        log = tl.log(at)
        _, of_others = read_off(below_L[:, None], cell, offset, here)
        own = gain / (log * log * at) * slope
        value = own * as_target_L[:, None] + of_others * as_source_L[:, None]
        give(out, place, there & (wide_L == 0)[:, None], tl.where(inside, value, 0.0), ADD)
