"""InfoNCE and its gradient in one Triton kernel: a pass for the sums, a pass for the gradient.

Legend of the shape suffixes: L lists, N candidates of a block.
"""

import triton
import triton.language as tl

from pipeline.formulas.kernels.fused.tiles import give, listed, places


@triton.jit
def info_nce(
    scores, positive, mask, out, loss, Q, N, down, along, inverse, alpha,
    MASKED: tl.constexpr, BACKWARD: tl.constexpr, ADD: tl.constexpr, EACH: tl.constexpr,
    LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills loss, and out (+=) with alpha x gradient; `inverse` is 1 / temperature.

    EACH averages over the positives, each against the negatives alone; else they share the mass.
    """
    list_L = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    lists = (scores, positive, mask, list_L, Q, N, down, along, inverse)
    all_L, found_L, count_L, wrong_L = _sums(*lists, MASKED, EACH, LISTS, BLOCK)
    some_L = tl.maximum(count_L, 1).to(tl.float32)
    pull_L = some_L
    if EACH:
        value_L, pull_L = _each(*lists, all_L, MASKED, LISTS, BLOCK)
        value_L, pull_L = value_L / some_L, pull_L / some_L
    else:
        value_L = tl.where(count_L > 0, all_L - found_L, 0.0)
    value_L = tl.where(wrong_L == 0, value_L, float("nan"))
    tl.store(loss + list_L, value_L, mask=list_L < Q)
    if BACKWARD:
        factor_L = tl.where(count_L > 0, alpha * inverse, 0.0)
        factor_L = tl.where(wrong_L == 0, factor_L, float("nan"))
        for start in range(0, N, BLOCK):
            logit, hit, inside, place, there = _tile(*lists, start, MASKED, BLOCK)
            if EACH:
                won = tl.sigmoid(all_L[:, None] - logit) / some_L[:, None]
                lost = tl.exp(tl.minimum(logit - all_L[:, None], 0.0)) * pull_L[:, None]
                slope = tl.where(hit, -won, lost)
            else:
                slope = tl.exp(tl.minimum(logit - all_L[:, None], 0.0))
                own = tl.exp(tl.minimum(logit - found_L[:, None], 0.0))
                slope = tl.where(hit, slope - own, slope)
            slope = tl.where(inside, slope * factor_L[:, None], 0.0)
            give(out, place, there, slope, ADD)


@triton.jit
def _tile(scores, positive, mask, list_L, Q, N, down, along, inverse, start,
          MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(logit_LN, hit_LN, inside_LN, place_LN, there_LN) of a block of candidates."""
    candidate = start + tl.arange(0, BLOCK)
    there = (list_L < Q)[:, None] & (candidate < N)[None, :]
    place = places(list_L, candidate, down, along)
    score, inside = listed(scores, mask, place, there, MASKED)
    hit = inside & (tl.load(positive + place, mask=inside, other=0) != 0)
    return score * inverse, hit, inside, place, there


@triton.jit
def _more(most_L, sum_L, logit_LN, kept_LN):
    """The running (maximum, sum of exp(logit - maximum)) with a block more."""
    logit_LN = tl.where(kept_LN, logit_LN, -float("inf"))
    now_L = tl.maximum(most_L, tl.max(logit_LN, 1))
    from_L = tl.where(now_L == -float("inf"), 0.0, now_L)
    added_L = tl.sum(tl.exp(logit_LN - from_L[:, None]), 1)
    return now_L, sum_L * tl.exp(most_L - from_L) + added_L


@triton.jit
def _sums(scores, positive, mask, list_L, Q, N, down, along, inverse,
          MASKED: tl.constexpr, EACH: tl.constexpr, LISTS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """(log sum of all, or of all negatives; log sum of positives; their count; what is not finite).

    -1e30 for a sum of nothing.
    """
    most_L = tl.full((LISTS,), -float("inf"), tl.float32)
    sum_L = tl.zeros((LISTS,), tl.float32)
    top_L, hits_L = most_L, sum_L
    count_L, wrong_L = tl.zeros((LISTS,), tl.int32), tl.zeros((LISTS,), tl.int32)
    for start in range(0, N, BLOCK):
        logit, hit, inside, _, _ = _tile(
            scores, positive, mask, list_L, Q, N, down, along, inverse, start, MASKED, BLOCK
        )
        finite = tl.abs(logit) < float("inf")
        wrong_L += tl.sum((inside & (finite == 0)).to(tl.int32), 1)
        count_L += tl.sum(hit.to(tl.int32), 1)
        kept = inside & finite
        if EACH:
            kept = kept & (hit == 0)
        else:
            top_L, hits_L = _more(top_L, hits_L, logit, hit & finite)
        most_L, sum_L = _more(most_L, sum_L, logit, kept)
    all_L = tl.where(sum_L > 0, most_L + tl.log(tl.maximum(sum_L, 1.0)), -1e30)
    found_L = tl.where(hits_L > 0, top_L + tl.log(tl.maximum(hits_L, 1.0)), -1e30)
    return all_L, found_L, count_L, wrong_L


@triton.jit
def _each(scores, positive, mask, list_L, Q, N, down, along, inverse, all_L,
          MASKED: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(sum over positives of softplus(negatives - logit), sum of its slope)."""
    value_L, pull_L = tl.zeros((LISTS,), tl.float32), tl.zeros((LISTS,), tl.float32)
    for start in range(0, N, BLOCK):
        logit, hit, _, _, _ = _tile(
            scores, positive, mask, list_L, Q, N, down, along, inverse, start, MASKED, BLOCK
        )
        behind = all_L[:, None] - logit
        small = tl.exp(-tl.abs(behind))
        value_L += tl.sum(tl.where(hit, tl.maximum(behind, 0.0) + tl.log(1 + small), 0.0), 1)
        pull_L += tl.sum(tl.where(hit, tl.sigmoid(behind), 0.0), 1)
    return value_L, pull_L
