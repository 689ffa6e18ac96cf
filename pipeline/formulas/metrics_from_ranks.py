"""Metrics from the places of positives alone, for rankings that are never written out.

A place says how many candidates are above a positive and how many are tied with it, itself among
them. Values are those of `metrics`, expected over random tie-breaking; a query without positives
gets NaN.

Legend of the shape suffixes: Q queries, P pairs of a query and one of its positives.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.formulas.kernels.ties import chance_within, expected_place

NOWHERE = 2**40  # above a positive that no list holds


def per_query(
    query_P: Tensor,
    above_P: Tensor,
    tied_P: Tensor,
    queries: int,
    *,
    total_Q: Tensor | None = None,
    ks: Iterable[int] = (1, 5, 10),
) -> dict[str, Tensor]:
    """Dict of value_Q: R_at_k, rank, map_at_r and r_precision, in float64.

    `total_Q` is the number of positives, also of those that are in no pair: they are not found.

    >>> one = torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1, 1])
    >>> {k: v.item() for k, v in per_query(*one, 1, ks=(1,)).items()}
    {'R_at_1': 1.0, 'rank': 1.0, 'map_at_r': 0.5, 'r_precision': 0.5}
    """
    total_Q = torch.bincount(query_P, minlength=queries) if total_Q is None else total_Q
    listed_P = above_P < NOWHERE
    query_P, above_P, tied_P = query_P[listed_P], above_P[listed_P], tied_P[listed_P]
    key_P = query_P * (NOWHERE + 1) + above_P
    order_P = key_P.argsort(stable=True)
    query_P, above_P, tied_P = query_P[order_P], above_P[order_P], tied_P[order_P]
    count_Q = torch.bincount(query_P, minlength=queries)
    start_Q = count_Q.cumsum(0) - count_Q
    ties = torch.unique_consecutive(key_P[order_P], return_inverse=True, return_counts=True)
    _, group_P, size_G = ties
    hits_P = size_G[group_P]  # as many above means as high a score: the positives of one tie
    ahead_P = (size_G.cumsum(0) - size_G)[group_P] - start_Q[query_P]
    found_Q = count_Q > 0
    first_P = start_Q[found_Q]
    best = [part[first_P].double() for part in (above_P, tied_P, hits_P)]
    values = {f"R_at_{k}": chance_within(k, *best) for k in ks}
    values["rank"] = expected_place(*best)
    for name, of_found in values.items():
        missed = torch.full_like(total_Q, torch.inf if name == "rank" else 0.0, dtype=torch.float64)
        values[name] = missed.masked_scatter(found_Q, of_found)
    values |= _of_all(query_P, above_P, tied_P, hits_P, ahead_P, total_Q)
    return {name: value.masked_fill(total_Q == 0, torch.nan) for name, value in values.items()}


def _of_all(
    query_P: Tensor, above_P: Tensor, tied_P: Tensor, hits_P: Tensor, ahead_P: Tensor, all_Q: Tensor
) -> dict[str, Tensor]:
    """mAP@R and R-Precision.

    A tie of t, p of them positive, with a above it, has its first m places among the R. At place
    i of it stands a positive by chance p / t, and given that, (i - 1) (p - 1) / (t - 1) positives
    of the tie are before it: the sum over i is in closed form by harmonic numbers.
    """
    total_P = all_Q[query_P]
    inside_P = (total_P - above_P).clamp(min=0).minimum(tied_P)
    slope_P = (hits_P - 1) / (tied_P - 1).clamp(min=1).double()
    most = int(all_Q.max()) if len(all_Q) else 0
    harmonic = torch.cat([torch.zeros(1), 1 / torch.arange(1, most + 1).double()]).cumsum(0)
    harmonic = harmonic.double().to(query_P.device)
    from_P = above_P.clamp(max=most)
    span_P = harmonic[(from_P + inside_P).clamp(max=most)] - harmonic[from_P]
    value_P = inside_P * slope_P + (1 + ahead_P - slope_P * (above_P + 1)) * span_P
    zero_Q = torch.zeros(len(all_Q), dtype=torch.float64, device=query_P.device)
    precision_Q = zero_Q.index_add(0, query_P, value_P / tied_P) / all_Q
    found_Q = zero_Q.index_add(0, query_P, inside_P / tied_P.double()) / all_Q
    return {"map_at_r": precision_Q, "r_precision": found_Q}
