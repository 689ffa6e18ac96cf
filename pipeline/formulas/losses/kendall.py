"""Losses on the order of pairs: Kendall hinge, sliding windows (SW-HS), smooth Kendall tau.

Legend of the shape suffixes: Q queries, R rows of a block, N candidates of a query, W pairs of
window ends.
"""

import torch
from torch import Tensor

from pipeline.formulas.kernels import Kernel, Mask, Value, fused
from pipeline.formulas.kernels.fused import Fused
from pipeline.formulas.kernels.lists import of_lists
from pipeline.formulas.kernels.pairs import hinge_counts
from pipeline.formulas.kernels.rows import rows_in_cache, rowwise
from pipeline.formulas.kernels.smooth_rank import with_tau
from pipeline.formulas.kernels.sort import largest, order_of_rows, sort_rows_


def _fused_kendall(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    mask_QN: Mask,
    *,
    gap: float | None = None,
    margin: float = 0.0,
    window: int | None = None,
    hardest: int | None = None,
    average: str = "queries",
) -> Fused | None:
    if window is not None or hardest is not None or average != "queries":
        return None
    given = {"gap": 0.3 if gap is None else gap, "margin": margin}
    return scores_QN, fused.kernels().kendall_rank(relevance_QN, mask_QN, **given), given


@of_lists(graded=True, fused=_fused_kendall)
def kendall_rank(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    gap: float | None = None,
    margin: float = 0.0,
    mask_QN: Mask = None,
    window: int | None = None,
    hardest: int | None = None,
    average: str = "queries",
) -> Tensor:
    """loss_Q: the mean hinge over a query's pairs of candidates; 0 where there is no pair.

    Mean of [margin + s_k - s_j]+ over the pairs (j, k) with r_j > r_k + `gap`. `gap` and `margin`
    are in the units of relevance and score; a gap guards against noise in the labels: 0.3 by
    default, and 0 with a window. With `window` w only candidates w places apart in the order by
    relevance are paired (N - w pairs), and of these only the `hardest` h, by s_k - s_j, count.
    Among equal relevance the order is that of the list; equals never pair. `average="pairs"` weighs
    the queries by their pairs, so that the mean over queries is the mean over all pairs of the
    call, as in the authors' code. It needs all queries in one call; `pair_count` gives the weights.
    All pairs take O(N log N) time (the gradient of a hinge is a count) and O(N) memory per query,
    exact. Kendall ranking loss of BCLS (arXiv 2210.11319) as in the authors' code, but for the mean
    per query. SW-HS is inferred from what is said about the paper: its text was not at hand.

    >>> kendall_rank(torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([[1.0, 0.0, 0.9]]))
    tensor([0.1500])
    """
    if average not in ("queries", "pairs") or (average == "pairs" and window is not None):
        raise ValueError(f"average must be 'queries', or 'pairs' without a window, got {average!r}")
    whole = all(x is None or (isinstance(x, int) and x >= 1) for x in (window, hardest))
    if not whole or (window is None and hardest is not None):
        raise ValueError(
            f"window and hardest are whole numbers from 1, hardest only with a window: "
            f"{window=}, {hardest=}"
        )
    if gap is None:
        gap = 0.3 if window is None else 0.0
    settings = (gap, margin)
    kernel = _all_pairs(*settings) if window is None else _window_ends(*settings, window, hardest)
    rows = rows_in_cache(2 * scores_QN.shape[1], scores_QN.device)
    loss_Q = rowwise(kernel, rows, scores_QN, relevance_QN, mask_QN)
    if average == "pairs":
        pairs_Q = pair_count(relevance_QN, gap=gap, mask_QN=mask_QN).to(loss_Q.dtype)
        loss_Q = loss_Q * (pairs_Q / pairs_Q.mean().clamp(min=1e-30))
    return loss_Q


def pair_count(relevance_QN: Tensor, *, gap: float = 0.3, mask_QN: Mask = None) -> Tensor:
    """pairs_Q: how many pairs (j, k) of a query have r_j > r_k + gap.

    Those are what `kendall_rank` averages over.

    >>> pair_count(torch.tensor([[1.0, 0.0, 0.9]]), gap=0.3)
    tensor([2])
    """
    low_QN = high_QN = relevance_QN = relevance_QN.contiguous()
    if mask_QN is not None:
        low_QN = relevance_QN.masked_fill(~mask_QN, torch.inf)
        high_QN = relevance_QN.masked_fill(~mask_QN, -torch.inf)
    sorted_QN = sort_rows_(high_QN.clone())
    bar_QN = sort_rows_(low_QN + gap)
    return (relevance_QN.shape[1] - torch.searchsorted(sorted_QN, bar_QN, right=True)).sum(-1)


def _all_pairs(gap: float, margin: float) -> Kernel:
    def kernel(scores_RN: Tensor, relevance_RN: Tensor, mask_RN: Mask, *, backward: bool) -> Value:
        low_RN = high_RN = relevance_RN
        if mask_RN is not None:
            low_RN = relevance_RN.masked_fill(~mask_RN, torch.inf)
            high_RN = relevance_RN.masked_fill(~mask_RN, -torch.inf)
        counts = hinge_counts(high_RN, low_RN, scores_RN, gap=gap, margin=margin)
        as_low_RN, as_high_RN, pairs_R = counts
        # The sum over pairs of margin + s_k - s_j: a small difference of large sums, so in float64.
        scores_RN = scores_RN.double()
        sum_R = (as_low_RN * (margin + scores_RN) - as_high_RN * scores_RN).sum(-1).clamp(min=0)
        pairs_R = pairs_R.clamp(min=1)
        return sum_R / pairs_R, (as_low_RN - as_high_RN).double() / pairs_R[:, None]

    return kernel


def _window_ends(gap: float, margin: float, window: int, hardest: int | None) -> Kernel:
    def kernel(scores_RN: Tensor, relevance_RN: Tensor, mask_RN: Mask, *, backward: bool) -> Value:
        if mask_RN is not None:
            relevance_RN = relevance_RN.masked_fill(~mask_RN, -torch.inf)
        order_RN = order_of_rows(relevance_RN, descending=True)
        # Of both ends of every window: place, score, relevance.
        high, low = slice(0, max(0, order_RN.shape[1] - window)), slice(window, None)
        ends = [order_RN[:, high], order_RN[:, low]]
        high_RW, low_RW = (relevance_RN.gather(1, order_RN)[:, end] for end in (high, low))
        pair_RW = high_RW > low_RW + gap
        if mask_RN is not None:
            pair_RW &= low_RW > -torch.inf
        scores_RN = scores_RN.gather(1, order_RN)
        wrong_RW = torch.where(pair_RW, scores_RN[:, low] - scores_RN[:, high], -torch.inf)
        if hardest is not None and hardest < wrong_RW.shape[1]:
            wrong_RW, kept_RW = largest(wrong_RW, hardest)
            ends = [end_RW.gather(1, kept_RW) for end_RW in ends]
        hinge_RW = (margin + wrong_RW).relu()
        pairs_R1 = (wrong_RW > -torch.inf).sum(-1, keepdim=True).clamp(min=1)
        loss_R = hinge_RW.sum(-1) / pairs_R1[:, 0]
        if not backward:
            return loss_R, None
        slope_RW = (hinge_RW > 0) / pairs_R1.to(scores_RN.dtype)
        gradient_RN = torch.zeros_like(scores_RN).scatter_add_(1, ends[1], slope_RW)
        return loss_R, gradient_RN.scatter_add_(1, ends[0], -slope_RW)

    return kernel


@of_lists(graded=True, learned=("tau",))
def kendall_smooth(
    scores_QN: Tensor, relevance_QN: Tensor, *, tau: float | Tensor = 0.01, mask_QN: Mask = None
) -> Tensor:
    """loss_Q: 1 - smooth Kendall tau_b, in [0, 2]; 0 where relevance orders nothing.

    tau_b is the correlation of two matrices of signs over the pairs: sum a b / sqrt(sum a^2 sum
    b^2), with a = sign(r_j - r_k) and b = 2 sigmoid((s_j - s_k) / tau) - 1; tau -> 0 gives
    `metrics.kendall_tau`, ties and all. `tau` is in units of the scores and may be learned. O(N^2)
    time, memory of one piece of the pairs at a time. The smooth variant is ours.

    >>> kendall_smooth(torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([[0.0, 0.5, 1.0]]))
    tensor([2.])
    """
    scores_QN, tau = with_tau(scores_QN, tau)
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    n = scores_QN.shape[1]
    kernel = _sign_correlation(tau, rows_in_cache(n, scores_QN.device))
    rows = rows_in_cache(n * n, scores_QN.device)
    return rowwise(kernel, rows, scores_QN, relevance_QN, mask_QN)


def _sign_correlation(tau: float, chunk: int) -> Kernel:
    def kernel(scores_RN: Tensor, relevance_RN: Tensor, mask_RN: Mask, *, backward: bool) -> Value:
        # 1 - A / sqrt(B C), A = sum a b, B = sum a^2, C = sum b^2; db/ds is (1 - b^2) / 2 tau.
        ab_R = aa_R = bb_R = scores_RN.new_zeros(len(scores_RN))
        of_ab_RN, of_bb_RN = torch.zeros_like(scores_RN), torch.zeros_like(scores_RN)
        for start in range(0, scores_RN.shape[1], chunk):
            some = slice(start, start + chunk)
            a_RJN = (relevance_RN[:, some, None] - relevance_RN[:, None, :]).sign()
            b_RJN = ((scores_RN[:, some, None] - scores_RN[:, None, :]) / (2 * tau)).tanh()
            if mask_RN is not None:
                pair_RJN = mask_RN[:, some, None] & mask_RN[:, None, :]
                a_RJN, b_RJN = a_RJN * pair_RJN, b_RJN * pair_RJN
            ab_R = ab_R + (a_RJN * b_RJN).sum((1, 2))
            aa_R = aa_R + a_RJN.square().sum((1, 2))
            bb_R = bb_R + b_RJN.square().sum((1, 2))
            if backward:  # the pairs (j, k) and (k, j) are alike, so one side of each, twice
                slope_RJN = (1 - b_RJN.square()) / tau
                of_ab_RN[:, some] = (a_RJN * slope_RJN).sum(-1)
                of_bb_RN[:, some] = (2 * b_RJN * slope_RJN).sum(-1)
        scale_R = (aa_R * bb_R).sqrt()
        nothing_R = scale_R == 0
        scale_R = scale_R.masked_fill(nothing_R, 1)
        loss_R = (1 - ab_R / scale_R).masked_fill(nothing_R, 0)
        pull_R = (ab_R / bb_R.clamp(min=1e-30) / 2)[:, None]
        gradient_RN = (pull_R * of_bb_RN - of_ab_RN) / scale_R[:, None]
        return loss_R, gradient_RN.masked_fill(nothing_R[:, None], 0)

    return kernel
