"""The Kendall hinge over all pairs with a gap, in Triton: counts of pairs, which are its gradient.

The value needs no more than counts: a hinge margin + s_k - s_j, summed over its pairs, is margin x
(how many) + the sum over candidates of score x (how often low - how often high).

Legend of the shape suffixes: I and J candidates of two blocks of a list.
"""

import triton
import triton.language as tl

from pipeline.formulas.kernels.fused.tiles import give, listed, places


@triton.jit
def _ends(scores, relevance, mask, one, N, down, along, start, gap,
          MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(score_I, label_I as high one, label_I + gap as low one, how many are not finite)."""
    candidate = start + tl.arange(0, BLOCK)
    there = (candidate < N)[None, :] & (one >= 0)[:, None]
    place = places(one, candidate, down, along)
    score, inside = listed(scores, mask, place, there, MASKED)
    label = tl.load(relevance + place, mask=inside, other=0.0).to(tl.float32)
    finite = (tl.abs(score) < float("inf")) & (tl.abs(label) < float("inf"))
    wrong = tl.sum((inside & (finite == 0)).to(tl.int32))
    pairs = inside & finite
    score_I = tl.sum(tl.where(pairs, score, 0.0), 0)
    high_I = tl.max(tl.where(pairs, label, -float("inf")), 0)
    low_I = tl.min(tl.where(pairs, label + gap, float("inf")), 0)
    return score_I, high_I, low_I, wrong


@triton.jit
def count(
    scores, relevance, mask, difference, sums, pairs, Q, N, down, along, gap, margin,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Of a block of a list: difference (how often low - how often high), and two sums.

    sums: of the hinges' share of this block, in float64, NaN with a number that is not finite;
    pairs: how many there are whatever their scores, of which this block has the low one.
    """
    number, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    one = number + tl.arange(0, 1)
    score_I, high_I, low_I, wrong = _ends(
        scores, relevance, mask, one, N, down, along, block * BLOCK, gap, MASKED, BLOCK
    )
    net = tl.zeros((BLOCK, OTHERS), tl.int32)
    held = tl.zeros((BLOCK, OTHERS), tl.int32)  # 2^16 x hinges that are open + pairs
    for start in range(0, N, OTHERS):
        score_J, high_J, low_J, _ = _ends(
            scores, relevance, mask, one, N, down, along, start, gap, MASKED, OTHERS
        )
        is_low = high_J[None, :] > low_I[:, None]
        is_high = high_I[:, None] > low_J[None, :]
        as_low = is_low & (score_J[None, :] < (score_I + margin)[:, None])
        as_high = is_high & (score_I[:, None] < (score_J + margin)[None, :])
        net += as_low.to(tl.int32) - as_high.to(tl.int32)
        held += tl.where(as_low, 65537, is_low.to(tl.int32))
    net_I = tl.sum(net, 1)
    candidate_I = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(difference + number * N + candidate_I, net_I, mask=candidate_I < N)
    opened = tl.sum((held >> 16).to(tl.int64))
    value = tl.sum(net_I.to(tl.float64) * score_I.to(tl.float64))
    value += opened.to(tl.float64) * margin
    place = number * tl.num_programs(1) + block
    tl.store(sums + place, tl.where(wrong == 0, value, float("nan")))
    tl.store(pairs + place, tl.sum((held & 65535).to(tl.int64)))


@triton.jit
def slope(
    scores, mask, difference, factor, out, Q, N, down, along,
    MASKED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills out (+=) with difference x the list's factor, 0 outside the list."""
    number = tl.program_id(0).to(tl.int64)
    one = number + tl.arange(0, 1)
    candidate = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (candidate < N)[None, :] & (one >= 0)[:, None]
    place = places(one, candidate, down, along)
    _, inside = listed(scores, mask, place, there, MASKED)
    net = tl.load(difference + one[:, None] * N + candidate[None, :], mask=there, other=0)
    value = net.to(tl.float32) * tl.load(factor + number)
    give(out, place, there, tl.where(inside, value, 0.0), ADD)
