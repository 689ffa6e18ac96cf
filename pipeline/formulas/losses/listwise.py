"""Losses over whole lists of graded relevance: S-NDCG, ListNet, ListMLE and the KL to soft labels.

Legend of the shape suffixes: Q queries, R rows of a block, N candidates of a query.
"""

import torch
from torch import Tensor

from pipeline.formulas.kernels import Kernel, Mask, Value, fused
from pipeline.formulas.kernels.fused import Fused
from pipeline.formulas.kernels.gradients import over_temperature
from pipeline.formulas.kernels.lists import of_lists
from pipeline.formulas.kernels.rows import rowwise
from pipeline.formulas.kernels.smooth_rank import Step, check_steps, stepper, with_tau
from pipeline.formulas.kernels.sort import order_of_rows, sort_rows_


def _fused_ndcg(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    mask_QN: Mask,
    *,
    tau: float | Tensor = 0.01,
    method: str = "auto",
    error: float = 4e-5,
    score_range: float | None = None,
) -> Fused | None:
    check_steps(1.0 if torch.is_tensor(tau) else tau, method, error)
    if method != "auto":
        return None
    scores_QN, number = with_tau(scores_QN, tau)
    if torch.is_tensor(tau):
        score_range = None  # of other scores
    settings = {"tau": number, "error": error, "score_range": score_range}
    run = fused.kernels().smooth_ndcg(relevance_QN, mask_QN, **settings)
    return scores_QN, run, settings


@of_lists(graded=True, learned=("tau",), fused=_fused_ndcg)
def smooth_ndcg(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    tau: float | Tensor = 0.01,
    mask_QN: Mask = None,
    method: str = "auto",
    error: float = 4e-5,
    score_range: float | None = None,
) -> Tensor:
    """loss_Q: 1 - smooth NDCG of each query's list, in [0, 1).

    DCG = sum of (2^r - 1) / log2(1 + rank), the rank smooth with temperature `tau` in units of the
    scores (it may be learned), and IDCG the DCG of the order by relevance. A list with no gain in
    it has nothing to order: 0, and no gradient. `method` and `error` are those of `smooth_rank`.
    Relevance below 0 has no meaning here.
    `score_range` is those scores' greatest difference where it is known (2 for cosines): then no
    device is asked for it.
    S-NDCG of Listwise ITR (arXiv 2305.16566), as the authors' code computes it; they give the text
    side the relevance un-transposed, `both_directions` transposes it. A partner of `triplet` or
    `info_nce` more than a loss of its own.

    >>> smooth_ndcg(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([0.0000, 0.3691])
    """
    if torch.is_tensor(tau):
        score_range = None  # of other scores
    scores_QN, tau = with_tau(scores_QN, tau)
    step, rows = stepper(
        scores_QN.detach(), tau=tau, method=method, error=error, score_range=score_range
    )
    kernel = _ndcg_kernel(step, scores_QN, min(rows, len(scores_QN)))
    return rowwise(kernel, rows, scores_QN, relevance_QN, mask_QN)


def _ndcg_kernel(step: Step, like_QN: Tensor, rows: int) -> Kernel:
    n = like_QN.shape[1]
    # Natural logarithms: their base cancels in the ratio of DCG to IDCG.
    place_N = torch.arange(n + 1, 1, -1, dtype=like_QN.dtype, device=like_QN.device)
    discount_N = 1 / place_N.log()
    workspace = like_QN.new_empty(3, rows, n)

    def kernel(scores_RN: Tensor, relevance_RN: Tensor, mask_RN: Mask, *, backward: bool) -> Value:
        gain_RN, place_RN, log_RN = workspace[:, : len(scores_RN)]
        torch.exp2(relevance_RN, out=gain_RN).sub_(1)  # 0 where masked out, as the relevance is
        ideal_R = sort_rows_(log_RN.copy_(gain_RN)) @ discount_N
        empty_R = ideal_R == 0
        gain_RN.div_(torch.where(empty_R, 1, ideal_R)[:, None])
        step.rank(scores_RN, mask_RN, place_RN).add_(1)
        torch.log(place_RN, out=log_RN)
        gain_RN.div_(log_RN)
        loss_R = torch.where(empty_R, 0, 1 - gain_RN.sum(-1))
        if not backward:
            return loss_R, None
        slope_RN = gain_RN.div_(log_RN).div_(place_RN)
        return loss_R, step.gradient(slope_RN, mask_RN, log_RN)

    return kernel


def _log_share(
    x_QN: Tensor, temperature: float | Tensor, mask_QN: Mask, name: str = "temperature"
) -> Tensor:
    """Log softmax over the list; candidates outside it have none of the share."""
    x_QN = over_temperature(x_QN, temperature, name)
    return (x_QN if mask_QN is None else x_QN.masked_fill(~mask_QN, -1e30)).log_softmax(-1)


@of_lists(graded=True, learned=("temperature", "target_temperature"))
def soft_label_kl(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    target_temperature: float | Tensor = 0.1,
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: KL divergence of the scores' softmax from the relevance's, in nats.

    Sum over the list of t (log t - log p), t = softmax(relevance / target_temperature), p =
    softmax(scores / temperature); 0 for an empty list. The soft-label alignment of CUSA (arXiv
    2403.05261), here with any relevance as the teacher; its use of unimodal similarities as the
    teacher is up to the caller.

    >>> scores = torch.tensor([[0.5, 0.5], [0.5, 0.4]])
    >>> soft_label_kl(scores, torch.full((2, 2), 0.3))
    tensor([0.0000, 0.4338])
    """
    target_QN = _log_share(relevance_QN, target_temperature, mask_QN, "target_temperature")
    log_ratio_QN = target_QN - _log_share(scores_QN, temperature, mask_QN)
    return _list_sum(target_QN.exp() * log_ratio_QN, mask_QN)


@of_lists(graded=True, learned=("temperature", "target_temperature"))
def list_net(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    target_temperature: float | Tensor = 0.1,
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: cross entropy of the scores' softmax under the relevance's, in nats.

    -sum over the list of t log p, t = softmax(relevance / target_temperature), p = softmax(scores /
    temperature). ListNet's top-one loss (Cao et al., ICML 2007), which has both temperatures 1. It
    is `soft_label_kl` plus the target's entropy: the same gradient, a value that does not reach 0.
    0 for an empty list.

    >>> list_net(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.3, 0.3]]))
    tensor([0.6931])
    """
    target_QN = _log_share(relevance_QN, target_temperature, mask_QN, "target_temperature").exp()
    return _list_sum(-target_QN * _log_share(scores_QN, temperature, mask_QN), mask_QN)


def _list_sum(value_QN: Tensor, mask_QN: Mask) -> Tensor:
    return (value_QN if mask_QN is None else value_QN.masked_fill(~mask_QN, 0)).sum(-1)


@of_lists(graded=True, learned=("temperature",))
def list_mle(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: -log likelihood of the order by relevance, in nats.

    Candidates are drawn one by one in proportion to exp(score / temperature). Sum over places i of
    logsumexp of the scores from i on, less the score at i: ListMLE (Xia et al., ICML 2008), a sum
    over the list and not a mean. Candidates of equal relevance each compete with all of their group
    (Breslow's way), so the value does not depend on how ties were sorted. 0 for an empty list.

    >>> list_mle(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.5]]))
    tensor([0.6931])
    """
    logits_QN = over_temperature(scores_QN, temperature)
    if mask_QN is not None:  # to the end of the order, with no weight
        logits_QN = logits_QN.masked_fill(~mask_QN, -1e30)
        relevance_QN = relevance_QN.masked_fill(~mask_QN, -torch.inf)
    order_QN = order_of_rows(relevance_QN, descending=True)
    relevance_QN = relevance_QN.gather(1, order_QN)
    logits_QN = logits_QN.gather(1, order_QN)
    from_here_QN = logits_QN.flip(1).logcumsumexp(1).flip(1)
    place_N = torch.arange(scores_QN.shape[1], device=scores_QN.device)
    new_QN = torch.ones_like(relevance_QN, dtype=torch.bool)
    new_QN[:, 1:] = relevance_QN[:, 1:] != relevance_QN[:, :-1]
    group_start_QN = torch.where(new_QN, place_N, 0).cummax(1).values
    value_QN = from_here_QN.gather(1, group_start_QN) - logits_QN
    return _list_sum(value_QN, None if mask_QN is None else mask_QN.gather(1, order_QN))
