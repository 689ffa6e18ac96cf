"""Metrics: one value per query, exact, with the expected value under random tie-breaking.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

import torch


def _best_positive(scores_QN, positive_QN):
    """(above_Q, tied_Q, tied_positives_Q): the place of the best-scoring positive of each query."""
    best_Q1 = scores_QN.masked_fill(~positive_QN, -torch.inf).amax(-1, keepdim=True)
    above_Q = (scores_QN > best_Q1).sum(-1).double()
    tied_QN = scores_QN == best_Q1
    return above_Q, tied_QN.sum(-1).double(), (tied_QN & positive_QN).sum(-1).double()


def _no_value(value_Q, scores_QN, positive_QN):
    undefined_Q = ~positive_QN.any(-1) | scores_QN.isnan().any(-1)
    return value_Q.masked_fill(undefined_Q, torch.nan)


def recall_at(scores_QN, positive_QN, k):
    """recall_Q: the chance that any positive is among the first k, 0 or 1 unless scores tie.

    >>> recall_at(torch.tensor([[0.3, 0.9, 0.1]]), torch.tensor([[True, False, False]]), 1)
    tensor([0.], dtype=torch.float64)
    """
    above_Q, tied_Q, hits_Q = _best_positive(scores_QN, positive_QN)
    slots_Q = (k - above_Q).clamp(min=0).minimum(tied_Q)
    misses_Q = (tied_Q - hits_Q).clamp(min=0)

    def log_choose(n_Q, m_Q):
        return torch.lgamma(n_Q + 1) - torch.lgamma(m_Q + 1) - torch.lgamma(n_Q - m_Q + 1)

    chosen_Q = torch.minimum(slots_Q, misses_Q)
    chance_Q = 1 - torch.exp(log_choose(misses_Q, chosen_Q) - log_choose(tied_Q, chosen_Q))
    return _no_value(chance_Q.masked_fill(slots_Q > misses_Q, 1.0), scores_QN, positive_QN)


def expected_rank(scores_QN, positive_QN):
    """rank_Q: expected place of the best-scoring positive, from 1, under random tie-breaking.

    >>> expected_rank(torch.zeros(1, 3), torch.tensor([[True, False, False]]))
    tensor([2.], dtype=torch.float64)
    """
    above_Q, tied_Q, hits_Q = _best_positive(scores_QN, positive_QN)
    return _no_value(1 + above_Q + (tied_Q - hits_Q) / (hits_Q + 1), scores_QN, positive_QN)


def ndcg(scores_QN, relevance_QN, *, k=None, gain="exp2"):
    """ndcg_Q in [0, 1]: DCG over the best DCG, cut at k places.

    >>> ndcg(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.0]]))
    tensor([1.], dtype=torch.float64)
    """
    scores_QN, relevance_QN = scores_QN.double(), relevance_QN.double()
    n = scores_QN.shape[1]
    gain_QN = torch.exp2(relevance_QN) - 1 if gain == "exp2" else relevance_QN
    discount_N = 1 / torch.log2(torch.arange(2, n + 2, dtype=torch.float64, device=scores_QN.device))
    if k is not None:
        discount_N[k:] = 0
    summed_N = torch.cat([discount_N.new_zeros(1), discount_N.cumsum(0)])
    sorted_QN = scores_QN.sort(-1).values
    left_QN = torch.searchsorted(sorted_QN, scores_QN)
    right_QN = torch.searchsorted(sorted_QN, scores_QN, right=True)
    mean_QN = (summed_N[n - left_QN] - summed_N[n - right_QN]) / (right_QN - left_QN)
    found_Q = (gain_QN * mean_QN).sum(-1)
    ideal_Q = (gain_QN.sort(-1, descending=True).values * discount_N).sum(-1)
    return found_Q / ideal_Q


def kendall_tau(scores_QN, relevance_QN):
    """tau_Q: Kendall's tau_b of scores and relevance.

    >>> kendall_tau(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.0, 0.5, 1.0]]))
    tensor([1.], dtype=torch.float64)
    """
    taus = []
    for s_N, r_N in zip(scores_QN.double(), relevance_QN.double(), strict=True):
        a_NN, b_NN = (s_N - s_N[:, None]).sign(), (r_N - r_N[:, None]).sign()
        taus.append((a_NN * b_NN).sum() / torch.sqrt((a_NN**2).sum() * (b_NN**2).sum()))
    return torch.stack(taus) if taus else scores_QN.new_zeros(0, dtype=torch.float64)


def _average_rank(x_QN):
    sorted_QN = x_QN.sort(-1).values
    left_QN = torch.searchsorted(sorted_QN, x_QN)
    return (left_QN + torch.searchsorted(sorted_QN, x_QN, right=True)).double() / 2


def spearman(scores_QN, relevance_QN):
    """rho_Q: Pearson correlation of the average ranks of scores and relevance.

    >>> spearman(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[0.0, 0.5, 1.0]])).round(decimals=9)
    tensor([1.], dtype=torch.float64)
    """
    a_QN, b_QN = _average_rank(scores_QN), _average_rank(relevance_QN)
    a_QN, b_QN = a_QN - a_QN.mean(-1, keepdim=True), b_QN - b_QN.mean(-1, keepdim=True)
    return (a_QN * b_QN).sum(-1) / torch.sqrt((a_QN**2).sum(-1) * (b_QN**2).sum(-1))


def map_at_r(scores_QN, positive_QN):
    """map_Q: mean over the first R places of precision at each positive, R the number of positives.

    >>> map_at_r(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, True]]))
    tensor([0.5000], dtype=torch.float64)
    """
    order_QN = scores_QN.argsort(dim=-1, descending=True, stable=True)
    hit_QN = positive_QN.gather(-1, order_QN).double()
    place_N = torch.arange(1, hit_QN.shape[1] + 1, dtype=torch.float64, device=hit_QN.device)
    total_Q1 = hit_QN.sum(-1, keepdim=True)
    precision_QN = hit_QN.cumsum(-1) / place_N
    return (hit_QN * precision_QN * (place_N <= total_Q1)).sum(-1) / total_Q1[:, 0]


def r_precision(scores_QN, positive_QN):
    """precision_Q: share of positives among the first R places, R the number of positives.

    >>> r_precision(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[True, False, True]]))
    tensor([0.5000], dtype=torch.float64)
    """
    order_QN = scores_QN.argsort(dim=-1, descending=True, stable=True)
    hit_QN = positive_QN.gather(-1, order_QN).double()
    place_N = torch.arange(1, hit_QN.shape[1] + 1, dtype=torch.float64, device=hit_QN.device)
    total_Q1 = hit_QN.sum(-1, keepdim=True)
    return (hit_QN * (place_N <= total_Q1)).sum(-1) / total_Q1[:, 0]
