"""Counting pairs of candidates in two orders at once, in O(N log N) sorts of ever longer runs.

As in merge sort: two neighbouring runs are sorted together, and where the right one's members fall
among the left one's says how many pairs across the two stand in which order. All rows and runs of a
level go through one sort.

Legend of the shape suffixes: Q queries, N candidates, P 2N padded to a power of two.
"""

import torch
from torch import Tensor

from pipeline.formulas.kernels.sort import compiled, order_of_rows, sort_rows_


def inversions(rank_QN: Tensor) -> Tensor:
    """inversions_Q: pairs i < j with rank_i > rank_j; ranks are integers in [0, N).

    >>> inversions(torch.tensor([[2, 0, 1, 1]]))
    tensor([3])
    """
    if rank_QN.device.type == "cpu" and (fast := compiled()):
        inversions_Q: Tensor = fast.inversions(rank_QN)
        return inversions_Q
    queries, n = rank_QN.shape
    size = 1 << max(0, n - 1).bit_length()
    key_QP = rank_QN.new_full((queries, size), n, dtype=torch.int32)
    key_QP[:, :n] = rank_QN
    key_QP *= 2
    place_P = torch.arange(size, dtype=torch.int32, device=key_QP.device)
    right_QP = torch.empty_like(key_QP)
    total_Q = rank_QN.new_zeros(queries, dtype=torch.int64)
    half = 1
    while half < size:
        runs = key_QP.view(-1, 2, half)
        # The last bit says which run; of equal ranks the left run's come first.
        runs.bitwise_and_(-2)[:, 1] += 1
        sort_rows_(key_QP.view(-1, 2 * half), runs=True)
        # A right member at place p of the two runs, the j-th of its own, has p - j left ones at or
        # below it.
        torch.bitwise_and(key_QP, 1, out=right_QP)
        right_QP.view(-1, 2 * half).mul_(place_P[: 2 * half])
        at_or_below_Q = right_QP.sum(-1) - size // (2 * half) * (half * (half - 1) // 2)
        total_Q += size // 2 * half - at_or_below_Q
        half *= 2
    return total_Q


def hinge_counts(
    high_QN: Tensor, low_QN: Tensor, score_QN: Tensor, *, gap: float, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(as_low_QN, as_high_QN, pairs_Q) over the pairs (j, k) with high_j > low_k + gap.

    as_low_k: the j of such a pair with score_j < score_k + margin; as_high_j: the k of such a pair
    with the same; pairs: how many pairs there are whatever their scores.

    >>> one = torch.tensor([[1.0, 0.0]])
    >>> hinge_counts(one, one, torch.tensor([[0.1, 0.3]]), gap=0.3, margin=0.0)
    (tensor([[0, 1]]), tensor([[1, 0]]), tensor([1]))
    """
    queries, n = score_QN.shape
    size = 1 << max(1, 2 * n - 1).bit_length()
    # 2N entries: first every candidate as the low one of a pair, moved by gap or margin, then as
    # the high one. Equal values stay in that order, which makes both comparisons strict.
    by_score = order_of_rows(torch.cat([score_QN + margin, score_QN], 1))
    places = torch.arange(2 * n, device=score_QN.device).expand_as(by_score)
    rank = torch.empty_like(by_score).scatter_(1, by_score, places)
    order = order_of_rows(-torch.cat([low_QN + gap, high_QN], 1))
    is_low = order < n
    # Every low one pairs with the high ones before it.
    pairs_Q = ((~is_low).cumsum(1) * is_low).sum(1)
    # Keys in the order of relevance; what fills up to a power of two ranks last and is no low one.
    key_QP = rank.new_empty((queries, size), dtype=torch.int32)
    key_QP[:, : 2 * n] = rank.gather(1, order) * 4 + is_low
    key_QP[:, 2 * n :] = torch.arange(2 * n, size, dtype=torch.int32, device=rank.device) * 4
    count_QP = _count_across_runs(key_QP)
    return count_QP.gather(1, rank[:, :n]), count_QP.gather(1, rank[:, n:]), pairs_Q


def _count_across_runs(key_QP: Tensor) -> Tensor:
    """count_QP by rank, from keys 4 x rank + (1 for a low one) in the order of relevance.

    A low one counts the high ones before it of lower rank, a high one the low ones after it of
    higher rank. Bit 2 of a key is made to say whether it comes from the left or the right run.
    """
    queries, size = key_QP.shape
    count_QP = key_QP.new_zeros((queries, size), dtype=torch.int64)
    half = 1
    while half < size:
        runs = key_QP.view(-1, 2, half)
        runs.bitwise_and_(-3)[:, 1] += 2
        key_QP = sort_rows_(key_QP.view(-1, 2 * half), runs=True)
        # Of the two runs together: high ones of the left, low ones of the right, by rank.
        kind = key_QP & 3
        left_high, right_low = kind == 0, kind == 3
        high_below = left_high.cumsum(1)
        low_below = right_low.cumsum(1)
        count = high_below * right_low + (low_below[:, -1:] - low_below) * left_high
        rank_QP = (key_QP >> 2).long().view(queries, size)
        count_QP.scatter_add_(1, rank_QP, count.view(queries, size))
        half *= 2
    return count_QP
