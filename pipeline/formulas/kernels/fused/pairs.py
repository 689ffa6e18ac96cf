"""S-NDCG and its gradient from all pairs, in Triton: exact, for short lists and for very wide ones.

A program takes a list at a time; the pairs are in registers, a tile of them at once, and the
backward pass computes them again.

Legend of the shape suffixes: I and J candidates of two blocks; a list is alone.
"""

import triton
import triton.language as tl

from pipeline.formulas.kernels.fused.ideal import of_sorted
from pipeline.formulas.kernels.fused.tiles import give, graded, places


@triton.jit
def smooth_ndcg(
    scores, relevance, mask, out, loss, ideal, wide, pulls,
    Q, N, down, along, steepness, alpha,
    MASKED: tl.constexpr, BACKWARD: tl.constexpr, ADD: tl.constexpr, SORT: tl.constexpr,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Fills loss, and out (+=) with alpha x gradient; `steepness` is 1 / tau.

    With SORT of 0 only the lists that `wide` names, whose ideal DCG is known.
    """
    pulls += tl.program_id(0).to(tl.int64) * N
    for number in range(tl.program_id(0), Q, tl.num_programs(0)):
        taken = True if SORT > 0 else tl.load(wide + number) != 0
        if taken:
            one = number + tl.arange(0, 1)
            lists = (scores, relevance, mask, one, Q, N, down, along)
            best = tl.sum(of_sorted(*lists, MASKED, SORT)) if SORT > 0 else tl.load(ideal + number)
            over = tl.where(best == 0, 1.0, best)
            tl.debug_barrier()  # the list before has been done with `pulls`
            dcg, wrong = _ranks(*lists, pulls, steepness, over, MASKED, BLOCK, OTHERS)
            value = tl.where(best == 0, 0.0, 1 - dcg / over)
            tl.store(loss + number, tl.where(wrong == 0, value, float("nan")))
            if BACKWARD:
                tl.debug_barrier()
                factor = tl.where(wrong == 0, alpha * steepness, float("nan"))
                _slopes(*lists, out, pulls, steepness, factor, MASKED, ADD, BLOCK, OTHERS)


@triton.jit
def _block(scores, relevance, mask, one, N, down, along, start,
           MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(score_I, gain_I, inside_I, wrong_I, place_1I) of a block of one list."""
    candidate = start + tl.arange(0, BLOCK)
    there = (candidate < N)[None, :] & (one >= 0)[:, None]
    place = places(one, candidate, down, along)
    score, gain, inside, wrong = graded(scores, relevance, mask, place, there, MASKED)
    return (
        tl.sum(score, 0), tl.sum(gain, 0), tl.sum(inside.to(tl.int32), 0) > 0,
        tl.sum(wrong.to(tl.int32)), place,
    )  # fmt: skip


@triton.jit
def _ranks(scores, relevance, mask, one, Q, N, down, along, pulls, steepness, over,
           MASKED: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr):  # fmt: skip
    """(DCG, count of what is not finite); fills `pulls` with the loss's slope by each rank."""
    dcg, wrong_in_all = 0.0, 0
    for start in range(0, N, BLOCK):
        own = _block(scores, relevance, mask, one, N, down, along, start, MASKED, BLOCK)
        score_I, gain_I, inside_I = own[0], own[1], own[2]
        above_I = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, N, OTHERS):
            others = _block(scores, relevance, mask, one, N, down, along, first, MASKED, OTHERS)
            score_J, inside_J = others[0], others[2]
            far_IJ = (score_J[None, :] - score_I[:, None]) * steepness
            small_IJ = tl.exp(-tl.abs(far_IJ))
            step_IJ = tl.where(far_IJ >= 0, 1.0, small_IJ) / (1 + small_IJ)
            above_I += tl.sum(tl.where(inside_J[None, :], step_IJ, 0.0), 1)
        at_I = above_I + 1.5
        log_I = tl.log(at_I)
        share_I = tl.where(inside_I, gain_I / log_I, 0.0)
        dcg += tl.sum(share_I)
        wrong_in_all += own[3]
        candidate_I = start + tl.arange(0, BLOCK)
        tl.store(pulls + candidate_I, share_I / (log_I * at_I * over), mask=candidate_I < N)
    return dcg, wrong_in_all


@triton.jit
def _slopes(scores, relevance, mask, one, Q, N, down, along, out, pulls, steepness, factor,
            MASKED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
            OTHERS: tl.constexpr):  # fmt: skip
    """A rank rises with every other score and falls with the candidate's own."""
    for start in range(0, N, BLOCK):
        own = _block(scores, relevance, mask, one, N, down, along, start, MASKED, BLOCK)
        score_I, inside_I, place = own[0], own[2], own[4]
        candidate_I = start + tl.arange(0, BLOCK)
        pull_I = tl.load(pulls + candidate_I, mask=candidate_I < N, other=0.0)
        sum_I = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, N, OTHERS):
            others = _block(scores, relevance, mask, one, N, down, along, first, MASKED, OTHERS)
            score_J, inside_J = others[0], others[2]
            candidate_J = first + tl.arange(0, OTHERS)
            pull_J = tl.load(pulls + candidate_J, mask=candidate_J < N, other=0.0)
            small_IJ = tl.exp(-tl.abs(score_J[None, :] - score_I[:, None]) * steepness)
            slope_IJ = small_IJ / ((1 + small_IJ) * (1 + small_IJ))
            slope_IJ *= pull_J[None, :] - pull_I[:, None]
            sum_I += tl.sum(tl.where(inside_J[None, :], slope_IJ, 0.0), 1)
        value_I = tl.where(inside_I, sum_I * factor, 0.0)
        give(out, place, (candidate_I < N)[None, :], value_I[None, :], ADD)
