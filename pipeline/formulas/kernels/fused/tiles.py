"""What the Triton kernels share: reading lists, and the cubic spline of the grid.

A kernel works on LISTS lists at a time, BLOCK candidates of each: one list where its candidates lie
side by side, eight where the lists do (columns of a matrix), so that every 32 bytes of memory that
are read are used. Places are 64-bit: a matrix may have more than 2^31 entries.

Legend of the shape suffixes: L lists, N candidates of a block, P the four cells of a spline.
"""

import triton
import triton.language as tl


@triton.jit
def places(list_L, candidate_N, down, along):
    """place_LN of the candidates: `down` from list to list, `along` from one to the next."""
    return list_L.to(tl.int64)[:, None] * down + candidate_N.to(tl.int64)[None, :] * along


@triton.jit
def listed(scores, mask, place_LN, there_LN, MASKED: tl.constexpr):
    """(score_LN in float32, inside_LN): a candidate that is masked out or of -inf is outside."""
    if MASKED:
        there_LN = there_LN & (tl.load(mask + place_LN, mask=there_LN, other=0) != 0)
    score_LN = tl.load(scores + place_LN, mask=there_LN, other=-float("inf")).to(tl.float32)
    return score_LN, there_LN & (score_LN != -float("inf"))


@triton.jit
def graded(scores, relevance, mask, place_LN, there_LN, MASKED: tl.constexpr):
    """(score_LN, gain_LN, inside_LN, wrong_LN): both 0 outside, and where one is not finite."""
    score_LN, inside_LN = listed(scores, mask, place_LN, there_LN, MASKED)
    label_LN = tl.load(relevance + place_LN, mask=inside_LN, other=0.0).to(tl.float32)
    finite_LN = (tl.abs(score_LN) < float("inf")) & (tl.abs(label_LN) < float("inf"))
    kept_LN = inside_LN & finite_LN
    score_LN = tl.where(kept_LN, score_LN, 0.0)
    gain_LN = tl.exp2(tl.where(kept_LN, label_LN, 0.0)) - 1
    return score_LN, gain_LN, inside_LN, inside_LN & (finite_LN == 0)


@triton.jit
def give(out, place_LN, there_LN, value_LN, ADD: tl.constexpr):
    """Stores value_LN, or adds it to what is there."""
    if ADD:
        value_LN += tl.load(out + place_LN, mask=there_LN, other=0.0)
    tl.store(out + place_LN, value_LN, mask=there_LN)


@triton.jit
def spline_weights(offset_LN):
    """weight_LNP: what each of a score's four cells gets, by its offset in the second of them."""
    p = tl.arange(0, 4)[None, None, :]
    x = offset_LN[:, :, None]
    one = tl.where(p == 0, 1.0, tl.where(p == 1, 4.0, tl.where(p == 2, 1.0, 0.0)))
    first = tl.where(p == 0, -3.0, tl.where(p == 2, 3.0, 0.0))
    second = tl.where(p == 0, 3.0, tl.where(p == 1, -6.0, tl.where(p == 2, 3.0, 0.0)))
    third = tl.where(p == 0, -1.0, tl.where(p == 1, 3.0, tl.where(p == 2, -3.0, 1.0)))
    return (one + x * (first + x * (second + x * third))) / 6


@triton.jit
def spread(sums, cell_LN, offset_LN, amount_LN, inside_LN):
    """Adds amount x spline weight to four cells, in whole numbers: their order does not matter.

    `sums` points at the lists' first cells; a list's grid belongs to one program alone, so no
    other program has to see the sums, and a barrier is enough before they are read.
    """
    amount_LNP = spline_weights(offset_LN) * amount_LN[:, :, None]
    whole_LNP = tl.floor(amount_LNP + 0.5).to(sums.dtype.element_ty)
    to_LNP = (sums + cell_LN)[:, :, None] + tl.arange(0, 4)[None, None, :]
    kept_LNP = inside_LN[:, :, None] & (tl.arange(0, 4)[None, None, :] >= 0)
    tl.atomic_add(to_LNP, whole_LNP, mask=kept_LNP, sem="relaxed", scope="cta")


@triton.jit
def read_off(grid, cell_LN, offset_LN, inside_LN):
    """(value_LN, slope_LN by cells) of the spline through the four cells there."""
    at = grid + cell_LN
    a = tl.load(at, mask=inside_LN, other=0.0)
    b = tl.load(at + 1, mask=inside_LN, other=0.0)
    c = tl.load(at + 2, mask=inside_LN, other=0.0)
    d = tl.load(at + 3, mask=inside_LN, other=0.0)
    one, first = (a + 4 * b + c) / 6, (c - a) / 2
    second, third = (a - 2 * b + c) / 2, (d - a + 3 * (b - c)) / 6
    x = offset_LN
    value_LN = one + x * (first + x * (second + x * third))
    return value_LN, first + x * (2 * second + 3 * x * third)


@triton.jit
def convolve(sums, grid, step, inverse,
             UP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
             REACH: tl.constexpr):  # fmt: skip
    """Fills lists' `grid` with their `sums` through the step: UP counts what lies above a cell.

    Rows of 64 cells, TILES of them a list. The rows up to REACH away go through the step in
    products of matrices; of those beyond, on the one side, all is counted. `step` is a table, its
    middle at (REACH + 1) x 64.
    """
    row = tl.arange(0, ROWS)
    tile = row % TILES
    cell = tl.arange(0, 64)
    own = row[:, None] * 64 + cell[None, :]
    # .cg: from the cache in which atomics are made, past the one in front of it.
    total = tl.sum(tl.load(sums + own, cache_modifier=".cg"), 1).to(tl.float32)
    beyond = row[None, :] - row[:, None]  # how far the source's row (a column) is above
    far = beyond > REACH if UP else beyond < -REACH
    far = far & ((row // TILES)[None, :] == (row // TILES)[:, None])
    rest = tl.sum(tl.where(far, total[None, :], 0.0), 1)
    near = tl.zeros((ROWS, 64), tl.float32)
    distance = cell[:, None] - cell[None, :]  # from the target (a column) to the source (a row)
    for shift in range(-REACH, REACH + 1):
        there = (tile + shift >= 0) & (tile + shift < TILES)
        source = tl.load(
            sums + shift * 64 + own, mask=there[:, None] & (cell >= 0)[None, :], other=0,
            cache_modifier=".cg",
        )  # fmt: skip
        above = shift * 64 + distance
        band = tl.load(step + (REACH + 1) * 64 + (above if UP else -above))
        near = tl.dot(source.to(tl.float32), band, near, input_precision="tf32x3")
    tl.store(grid + own, (near + rest[:, None]) * inverse)
