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
def _more(most, total, logit, kept):
    """Running (maximum, sum of exp(logit - maximum)), place by place, with a block more."""
    logit = tl.where(kept, logit, -float("inf"))
    now = tl.maximum(most, logit)
    base = tl.where(now == -float("inf"), 0.0, now)
    return now, total * tl.exp(most - base) + tl.exp(logit - base)


@triton.jit
def _log_sum(most, total):
    """The log of the sum over a list, from those of its places; -1e30 for a sum of nothing."""
    most_L = tl.max(most, 1)
    base_L = tl.where(most_L == -float("inf"), 0.0, most_L)
    sum_L = tl.sum(total * tl.exp(most - base_L[:, None]), 1)
    return tl.where(sum_L > 0, base_L + tl.log(tl.maximum(sum_L, 1.0)), -1e30)


@triton.jit
def _sums(scores, positive, mask, list_L, Q, N, down, along, inverse,
          MASKED: tl.constexpr, EACH: tl.constexpr, LISTS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """(log sum of all, or of negatives; of positives; their count; whether some are not finite)."""
    most = tl.full((LISTS, BLOCK), -float("inf"), tl.float32)
    total = tl.zeros((LISTS, BLOCK), tl.float32)
    top, hits = most, total
    count, wrong = tl.zeros((LISTS, BLOCK), tl.int32), tl.zeros((LISTS, BLOCK), tl.int32)
    for start in range(0, N, BLOCK):
        logit, hit, inside, _, _ = _tile(
            scores, positive, mask, list_L, Q, N, down, along, inverse, start, MASKED, BLOCK
        )
        finite = tl.abs(logit) < float("inf")
        wrong += (inside & (finite == 0)).to(tl.int32)
        count += hit.to(tl.int32)
        kept = inside & finite
        if EACH:
            kept = kept & (hit == 0)
        else:
            top, hits = _more(top, hits, logit, hit & finite)
        most, total = _more(most, total, logit, kept)
    return _log_sum(most, total), _log_sum(top, hits), tl.sum(count, 1), tl.max(wrong, 1)


@triton.jit
def _each(scores, positive, mask, list_L, Q, N, down, along, inverse, all_L,
          MASKED: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(sum over positives of softplus(negatives - logit), sum of its slope)."""
    value, pull = tl.zeros((LISTS, BLOCK), tl.float32), tl.zeros((LISTS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        logit, hit, _, _, _ = _tile(
            scores, positive, mask, list_L, Q, N, down, along, inverse, start, MASKED, BLOCK
        )
        behind = all_L[:, None] - logit
        small = tl.exp(-tl.abs(behind))
        value += tl.where(hit, tl.maximum(behind, 0.0) + tl.log(1 + small), 0.0)
        pull += tl.where(hit, tl.sigmoid(behind), 0.0)
    return tl.sum(value, 1), tl.sum(pull, 1)
