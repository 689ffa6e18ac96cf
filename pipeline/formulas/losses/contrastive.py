"""Losses that tell a query's positives from its negatives: triplet, InfoNCE, SigLIP.

Legend of the shape suffixes: Q queries, R rows of a block, N candidates of a query, P (query,
positive) pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.formulas.kernels import Mask, fused
from pipeline.formulas.kernels.fused import Fused
from pipeline.formulas.kernels.gradients import over_temperature, refuse_learned
from pipeline.formulas.kernels.lists import of_lists
from pipeline.formulas.kernels.rows import differentiated, rows_in_cache, rowwise


@of_lists(graded=False, learned=("tau",))
def triplet(
    scores_QN: Tensor,
    positive_QN: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    tau: float | Tensor = 0.05,
    mining: float = 1.0,
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: mean over a query's positives of [margin + negative - positive]+.

    0 without a positive or without a negative. The negative is, by `negatives`: `hardest`, the
    highest score (VSE++); `soft`, tau x logsumexp(score / tau), which is `hardest` for tau -> 0;
    `all`, every negative in turn, the hinges averaged. `margin` and `tau` are in units of the
    scores. Whatever is positive is never a negative: mark the other captions of the same image as
    positive. `mining` mixes (1 - mining) x `all` + mining x the chosen one: a schedule from 0 to 1
    is the warm-up without which `hardest` often collapses from scratch. Negatives that tie for
    hardest share the gradient. VSE++ (arXiv 1707.05612); `soft` is Triplet-SN of BCLS (arXiv
    2210.11319), inferred: its text was not at hand.

    >>> scores, positive = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[True, False, False]])
    >>> triplet(scores, positive)
    tensor([0.1000])
    >>> triplet(scores, positive, negatives="all")
    tensor([0.0500])
    """
    if negatives not in ("hardest", "soft", "all"):
        raise ValueError(f"negatives must be 'hardest', 'soft' or 'all', got {negatives!r}")
    if negatives != "soft":
        refuse_learned(f"triplet of {negatives} negatives", {"tau": tau}, ())
    mining = 0.0 if negatives == "all" else mining

    def row_loss(scores_RN: Tensor, positive_RN: Tensor, mask_RN: Mask) -> Tensor:
        negative_RN = ~positive_RN if mask_RN is None else ~positive_RN & mask_RN
        row_P, place_P = positive_RN.nonzero(as_tuple=True)
        bar_P = margin - scores_RN[row_P, place_P]
        hinge_P = torch.zeros_like(bar_P)
        if mining < 1:
            hinge_PN = (scores_RN[row_P] + bar_P[:, None]).relu() * negative_RN[row_P]
            hinge_P = (1 - mining) * hinge_PN.sum(-1) / negative_RN.sum(-1).clamp(min=1)[row_P]
        if mining > 0:
            hidden_RN = scores_RN.masked_fill(~negative_RN, -1e30)
            hard_R = hidden_RN.amax(-1)
            if negatives == "soft":
                hard_R = tau * over_temperature(hidden_RN, tau, "tau").logsumexp(-1)
            hinge_P = hinge_P + mining * (hard_R[row_P] + bar_P).relu()
        sum_R = torch.zeros_like(scores_RN[:, 0]).index_add(0, row_P, hinge_P)
        return sum_R / positive_RN.sum(-1).clamp(min=1)

    if torch.is_tensor(tau) and tau.requires_grad:  # a kernel gives the scores' gradient alone
        return row_loss(scores_QN, positive_QN, mask_QN)
    rows = rows_in_cache(2 * scores_QN.shape[1], scores_QN.device)
    return rowwise(differentiated(row_loss), rows, scores_QN, positive_QN, mask_QN)


def _fused_info_nce(
    scores_QN: Tensor,
    positive_QN: Tensor,
    mask_QN: Mask,
    *,
    temperature: float | Tensor = 0.05,
    positives: str = "any",
) -> Fused | None:
    _check_positives(positives)
    if torch.is_tensor(temperature) or not temperature > 0:  # a tensor may ask for its gradient
        scores_QN, temperature = over_temperature(scores_QN, temperature), 1.0
    settings = {"temperature": temperature, "positives": positives}
    return scores_QN, fused.kernels().info_nce(positive_QN, mask_QN, **settings), settings


@of_lists(graded=False, learned=("temperature",), fused=_fused_info_nce)
def info_nce(
    scores_QN: Tensor,
    positive_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    positives: str = "any",
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: -log of the positives' share of softmax(scores / temperature), in nats.

    -log(sum over positives p of e(s_p) / sum over the list of e(s)), e(x) = exp(x / temperature); 0
    without positives. With several positives `any` asks that they share all the mass, in whatever
    way: -log(sum over positives / sum over all); `each` averages over the positives, each against
    the negatives alone. `temperature` may be a learned tensor. InfoNCE (arXiv 1807.03748).

    >>> info_nce(torch.tensor([[0.5, 0.5]]), torch.tensor([[True, False]]))
    tensor([0.6931])
    """
    logits_QN = over_temperature(scores_QN, temperature)
    return _info_nce(logits_QN, positive_QN, mask_QN, positives)


@of_lists(graded=True, learned=("temperature",))
def masked_info_nce(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    ignore_above: float = 0.5,
    positive_at: float = 1.0,
    positives: str = "any",
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: `info_nce` without the negatives that are too relevant to be called negative.

    -log(sum over p of e_p / (sum over p of e_p + sum over n of e_n)), e = exp(score / temperature),
    over positives p (r_p >= `positive_at`) and negatives n (r_n <= `ignore_above`). Candidates with
    relevance of `positive_at` or more are the positives (1 is what `from_captions` gives to the
    same image); those above `ignore_above` and below it leave the list.

    >>> masked_info_nce(torch.tensor([[0.5, 0.5, 0.5]]), torch.tensor([[1.0, 0.7, 0.1]]))
    tensor([0.6931])
    """
    positive_QN = relevance_QN >= positive_at
    kept_QN = positive_QN | ~(relevance_QN > ignore_above)
    if mask_QN is not None:
        positive_QN, kept_QN = positive_QN & mask_QN, kept_QN & mask_QN
    return _info_nce(over_temperature(scores_QN, temperature), positive_QN, kept_QN, positives)


@of_lists(graded=True, learned=("temperature",))
def adaptive_info_nce(
    scores_QN: Tensor,
    relevance_QN: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    margin: float = 0.2,
    positive_at: float = 1.0,
    positives: str = "any",
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q: `info_nce` in which a negative's score is raised by margin x (1 - its relevance).

    -log(P / (P + sum over negatives n of e(s_n + margin (1 - r_n)))), P = sum over positives p of
    e(s_p), e(x) = exp(x / temperature). The less relevant a negative, the further below the
    positives it must lie. `margin` is in units of the scores; candidates with relevance of
    `positive_at` or more are the positives.

    >>> adaptive_info_nce(torch.tensor([[0.5, 0.4]]), torch.tensor([[1.0, 0.5]]))
    tensor([0.6931])
    """
    positive_QN = relevance_QN >= positive_at
    if mask_QN is not None:
        positive_QN = positive_QN & mask_QN
    raised_QN = scores_QN + (margin * (1 - relevance_QN)).masked_fill(positive_QN, 0)
    return _info_nce(over_temperature(raised_QN, temperature), positive_QN, mask_QN, positives)


@of_lists(graded=False, learned=("scale", "bias"))
def siglip(
    scores_QN: Tensor,
    positive_QN: Tensor,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    mask_QN: Mask = None,
) -> Tensor:
    """loss_Q in nats: sum over the list of -log sigmoid(+-(scale x score + bias)).

    + for positives. A sum per query, so that its mean over queries is the paper's. `scale` and
    `bias` may be learned tensors; the defaults are the paper's start. SigLIP (arXiv 2303.15343).

    >>> siglip(torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]]))
    tensor([1.3863])
    """
    logits_QN = scores_QN * scale + bias
    loss_QN = F.softplus(torch.where(positive_QN, -logits_QN, logits_QN))
    return (loss_QN if mask_QN is None else loss_QN.masked_fill(~mask_QN, 0)).sum(-1)


def _check_positives(positives: str) -> None:
    if positives not in ("any", "each"):
        raise ValueError(f"positives must be 'any' or 'each', got {positives!r}")


def _info_nce(logits_QN: Tensor, positive_QN: Tensor, mask_QN: Mask, positives: str) -> Tensor:
    _check_positives(positives)
    if kernels := fused.takes(logits_QN, positive_QN):
        run = kernels.info_nce(positive_QN, mask_QN, temperature=1.0, positives=positives)
        return fused.loss_of(
            logits_QN, run, lambda own: _in_torch(own, positive_QN, mask_QN, positives)
        )
    return _in_torch(logits_QN, positive_QN, mask_QN, positives)


def _in_torch(logits_QN: Tensor, positive_QN: Tensor, mask_QN: Mask, positives: str) -> Tensor:
    if mask_QN is not None:
        logits_QN = logits_QN.masked_fill(~mask_QN, -1e30)
    found_QN = logits_QN.masked_fill(~positive_QN, -1e30)
    if positives == "any":
        loss_Q = logits_QN.logsumexp(-1) - found_QN.logsumexp(-1)
    else:
        others_Q1 = logits_QN.masked_fill(positive_QN, -1e30).logsumexp(-1, keepdim=True)
        loss_QN = F.softplus(others_Q1 - logits_QN).masked_fill(~positive_QN, 0)
        loss_Q = loss_QN.sum(-1) / positive_QN.sum(-1).clamp(min=1)
    return loss_Q.masked_fill(~positive_QN.any(-1), 0)
