"""Metrics: one value per query in float64, exact, expected over random tie-breaking.

A model that gives every candidate the same score gets chance, never 100 %. A query without a value
(no positive, no relevance, nothing to order) and a query with a NaN get NaN: average with `nanmean`
and say how many were left out. `mask_QN` is True for candidates in the list; one that is not takes
no part at all. A score of -inf says that a candidate was not retrieved: a positive is missed,
relevance is gain that was not had, and orders are compared of the others alone. Values are
fractions and ranks; percent is for printing.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.formulas.kernels import Mask
from pipeline.formulas.kernels.pairs import inversions
from pipeline.formulas.kernels.rows import block_of, blocks, prepared, rows_in_cache
from pipeline.formulas.kernels.sort import compiled, largest, order_of_rows, sort_rows_
from pipeline.formulas.kernels.ties import chance_within, expected_place
from pipeline.formulas.metrics_from_ranks import NOWHERE

Gain = Callable[[Tensor], Tensor]
GAINS: dict[str, Gain] = {"exp2": lambda r: torch.exp2(r) - 1, "linear": lambda r: r}


def recall_at(scores_QN: Tensor, positive_QN: Tensor, k: int, *, mask_QN: Mask = None) -> Tensor:
    """recall_Q: the chance that any positive is among the first k places: 0 or 1 unless scores tie.

    For images with several captions this is the usual R@K (a hit if any caption is found). With t
    candidates tied around place k, p of them positive, and m places left, the chance is 1 - C(t -
    p, m) / C(t, m).

    >>> recall_at(torch.tensor([[0.3, 0.9, 0.1]]), torch.tensor([[True, False, False]]), 2)
    tensor([1.], dtype=torch.float64)
    >>> recall_at(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]), 1)
    tensor([0.2500], dtype=torch.float64)
    """
    above_Q, tied_Q, hits_Q, valued_Q = _best_positive(scores_QN, positive_QN, mask_QN)
    return chance_within(k, above_Q, tied_Q, hits_Q).masked_fill(~valued_Q, torch.nan)


def expected_rank(scores_QN: Tensor, positive_QN: Tensor, *, mask_QN: Mask = None) -> Tensor:
    """rank_Q: the expected place, from 1, of the first positive; inf where none was retrieved.

    Its median over queries is MedR and its mean MeanR. 1 + how many score above the best positive +
    (t - p) / (p + 1), of t tied with it, p of them positive.

    >>> expected_rank(torch.zeros(1, 3), torch.tensor([[True, False, False]]))
    tensor([2.], dtype=torch.float64)
    """
    above_Q, tied_Q, hits_Q, valued_Q = _best_positive(scores_QN, positive_QN, mask_QN)
    rank_Q = expected_place(above_Q, tied_Q, hits_Q).masked_fill(above_Q >= NOWHERE, torch.inf)
    return rank_Q.masked_fill(~valued_Q, torch.nan)


def ndcg(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    k: int | None = None,
    gain: str = "exp2",
    mask_QN: Mask = None,
) -> Tensor:
    """ndcg_Q in [0, 1]: DCG of the order by score over that of the order by relevance, to place k.

    DCG = sum of gain / log2(1 + place). `gain` is `exp2` (2^r - 1) or `linear` (r): say which with
    every figure. Tied candidates share the mean discount of their places, as in scikit-learn. NaN
    where nothing has gain. Järvelin and Kekäläinen (TOIS 2002), with the gain of Burges et al.
    (ICML 2005).

    >>> ndcg(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([1.0000, 0.6309], dtype=torch.float64)
    """
    if gain not in GAINS:
        raise ValueError(f"gain must be one of {', '.join(GAINS)}, got {gain!r}")
    scores_QN, relevance_QN, mask_QN = prepared(scores_QN, relevance_QN, mask_QN)
    if mask_QN is not None:
        scores_QN = scores_QN.masked_fill(~mask_QN, -torch.inf)
    n = scores_QN.shape[1]
    depth = n if k is None else min(k, n)
    place_K = torch.arange(2, depth + 2, dtype=torch.float64, device=scores_QN.device)
    discount_K = 1 / torch.log2(place_K)
    ndcg_Q = discount_K.new_empty(len(scores_QN))
    for rows in blocks(len(scores_QN), rows_in_cache(n, scores_QN.device)):
        part = block_of(scores_QN, rows), block_of(relevance_QN, rows)
        ndcg_Q[rows] = _ndcg(*part, discount_K, GAINS[gain])
    return ndcg_Q


def kendall_tau(scores_QN: Tensor, relevance_QN: Tensor, *, mask_QN: Mask = None) -> Tensor:
    """tau_Q in [-1, 1]: Kendall's tau_b, exact with ties; NaN where either side is all equal.

    (concordant - discordant) / sqrt(pairs untied in score x pairs untied in relevance), in O(N
    log N).

    >>> kendall_tau(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.0, 0.5, 0.5]]))
    tensor([0.8165], dtype=torch.float64)
    """
    mask_QN = _retrieved(scores_QN, mask_QN)
    scores_QN, relevance_QN, mask_QN = prepared(scores_QN, relevance_QN, mask_QN)
    n = scores_QN.shape[1]
    # Outside the list: below all in both orders, so no inversion and one tie, taken off again.
    if mask_QN is not None:
        scores_QN = scores_QN.masked_fill(~mask_QN, -torch.inf)
        relevance_QN = relevance_QN.masked_fill(~mask_QN, -torch.inf)
    by_score_QN = order_of_rows(scores_QN)
    score_group_QN, tied_s_Q = _groups(scores_QN.gather(1, by_score_QN))
    relevance_QN = relevance_QN.gather(1, by_score_QN)
    both_QN = order_of_rows(relevance_QN)  # by relevance, equals by score
    rank_QN = score_group_QN.gather(1, both_QN)
    relevance_QN = relevance_QN.gather(1, both_QN)
    _, tied_r_Q = _groups(relevance_QN)
    _, tied_both_Q = _groups(relevance_QN, rank_QN)
    inside_Q = tied_s_Q * 0 + n if mask_QN is None else mask_QN.sum(-1)
    pairs_Q = (inside_Q * (inside_Q - 1) + (n - inside_Q) * (n - inside_Q - 1)) // 2
    untied_s_Q, untied_r_Q = pairs_Q - tied_s_Q, pairs_Q - tied_r_Q
    untied_Q = untied_s_Q + untied_r_Q - pairs_Q + tied_both_Q
    scale_Q = untied_s_Q.double().sqrt() * untied_r_Q.double().sqrt()
    tau_Q = (untied_Q - 2 * inversions(rank_QN)) / scale_Q
    bad_Q = (scores_QN.isnan() | relevance_QN.isnan()).any(-1)
    return tau_Q.masked_fill(bad_Q, torch.nan)


def spearman(scores_QN: Tensor, relevance_QN: Tensor, *, mask_QN: Mask = None) -> Tensor:
    """rho_Q in [-1, 1]: correlation of the ranks, tied ones averaged.

    NaN where a side is all equal.

    >>> spearman(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.0, 1.0, 0.5]]))
    tensor([0.5000], dtype=torch.float64)
    """
    mask_QN = _retrieved(scores_QN, mask_QN)
    scores_QN, relevance_QN, mask_QN = prepared(scores_QN, relevance_QN, mask_QN)
    ranks = []
    for x_QN in (scores_QN, relevance_QN):
        order_QN, start_QN, end_QN = _ordered(x_QN, mask_QN)
        rank_QN = torch.zeros_like(x_QN, dtype=torch.float64)
        rank_QN.scatter_(1, order_QN, (start_QN + end_QN).double() / 2)
        inside_QN = torch.ones_like(rank_QN) if mask_QN is None else mask_QN.double()
        mean_Q = (rank_QN * inside_QN).sum(-1) / inside_QN.sum(-1)
        ranks.append((rank_QN - mean_Q[:, None]) * inside_QN)
    a_QN, b_QN = ranks
    rho_Q = (a_QN * b_QN).sum(-1) / ((a_QN * a_QN).sum(-1) * (b_QN * b_QN).sum(-1)).sqrt()
    return rho_Q.masked_fill((scores_QN + relevance_QN).isnan().any(-1), torch.nan)


def _retrieved(scores_QN: Tensor, mask_QN: Mask) -> Mask:
    """The mask without candidates of score -inf."""
    out_QN = scores_QN == -torch.inf
    if not out_QN.any():
        return mask_QN
    return ~out_QN if mask_QN is None else mask_QN & ~out_QN


def _best_positive(scores_QN: Tensor, positive_QN: Tensor, mask_QN: Mask) -> tuple[Tensor, ...]:
    """(above_Q, tied_Q, hits_Q, valued_Q) around the best-scoring positive of each query."""
    scores_QN, positive_QN, mask_QN = prepared(scores_QN, positive_QN, mask_QN)
    if mask_QN is not None:
        scores_QN = scores_QN.masked_fill(~mask_QN, -torch.inf)
    valued_Q = positive_QN.any(-1) & ~scores_QN.isnan().any(-1)
    if scores_QN.shape[1] == 0:
        zero_Q = scores_QN.sum(-1).double()
        return zero_Q, zero_Q, zero_Q, valued_Q
    best_Q1 = scores_QN.masked_fill(~positive_QN, -torch.inf).amax(-1, keepdim=True)
    tied_QN = scores_QN == best_Q1
    counts = ((scores_QN > best_Q1), tied_QN, tied_QN & positive_QN)
    above_Q, tied_Q, hits_Q = (count.sum(-1).double() for count in counts)
    return above_Q.masked_fill(best_Q1[:, 0] == -torch.inf, NOWHERE), tied_Q, hits_Q, valued_Q


def _ndcg(scores_RN: Tensor, relevance_RN: Tensor, discount_K: Tensor, gain: Gain) -> Tensor:
    """ndcg_R of a block of rows."""
    depth, n = len(discount_K), scores_RN.shape[1]
    bad_R = scores_RN.isnan().any(-1)
    if 0 < 16 * depth <= n:  # those at the top are enough
        best_RK = largest(relevance_RN, depth)[0]
        # With all that tie with the last of them, and perhaps a few after those.
        least_R1 = largest(scores_RN, depth)[0].amin(1, keepdim=True)
        count = int((scores_RN >= least_R1).sum(1).amax())
        scores_RN, rows_RM = largest(scores_RN, max(count, depth))
        relevance_RN = relevance_RN.gather(1, rows_RM)
    else:
        best_RK = relevance_RN.clone()
    # A gain rises with relevance, which is shorter to sort.
    best_RK = sort_rows_(best_RK)[:, best_RK.shape[1] - depth :]
    ideal_R = gain(best_RK.double()) @ discount_K.flip(0)
    n = scores_RN.shape[1]
    before_N = torch.nn.functional.pad(discount_K.cumsum(0), (1, 0))
    before_N = torch.cat([before_N, before_N[-1:].expand(n - depth)])
    gain_RN = gain(relevance_RN.double()).masked_fill(scores_RN == -torch.inf, 0)
    if n >= 256 and scores_RN.device.type == "cpu" and (fast := compiled()):
        found_R: Tensor = fast.dcg(
            scores_RN, order_of_rows(scores_RN, descending=True), gain_RN, before_N
        )
    else:
        order_RN, start_RN, end_RN = _ordered(scores_RN, None)
        shared_RN = (before_N[end_RN] - before_N[start_RN]) / (end_RN - start_RN)
        found_R = (gain_RN.gather(1, order_RN) * shared_RN).sum(-1)
    return (found_R / ideal_R).masked_fill(bad_R, torch.nan)


def _ordered(scores_QN: Tensor, mask_QN: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """(order_QN, start_QN, end_QN): candidates from high to low, and the places of each's tie."""
    if mask_QN is not None:
        scores_QN = scores_QN.masked_fill(~mask_QN, -torch.inf)
    order_QN = order_of_rows(scores_QN, descending=True)
    sorted_QN = scores_QN.gather(1, order_QN)
    n = sorted_QN.shape[1]
    place_N = torch.arange(n, device=sorted_QN.device)
    new_QN = torch.ones_like(sorted_QN, dtype=torch.bool)
    new_QN[:, 1:] = sorted_QN[:, 1:] != sorted_QN[:, :-1]
    start_QN = torch.where(new_QN, place_N, 0).cummax(1).values if n else order_QN
    end_QN = torch.where(new_QN.roll(-1, 1), place_N + 1, n).flip(1)
    end_QN = end_QN.cummin(1).values.flip(1) if n else order_QN
    return order_QN, start_QN, end_QN


def _groups(*sorted_QN: Tensor) -> tuple[Tensor, Tensor]:
    """(group_QN, tied_Q) of rows in which equals stand side by side.

    Groups are numbered from 0; tied are the pairs that are equal in all of the rows given.
    """
    group_QN = torch.zeros_like(sorted_QN[0], dtype=torch.int64)
    for x_QN in sorted_QN:
        group_QN[:, 1:] |= x_QN[:, 1:] != x_QN[:, :-1]
    group_QN = group_QN.cumsum(1)
    size_QN = torch.zeros_like(group_QN).scatter_add_(1, group_QN, torch.ones_like(group_QN))
    return group_QN, (size_QN * (size_QN - 1)).sum(-1) // 2
