"""Losses: one value per query, lower is better, smooth in the scores.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.formulas.kendall_losses import kendall_rank, kendall_smooth
from pipeline.formulas.listwise_losses import list_mle, list_net, smooth_ndcg, soft_label_kl


def _ready(scores_QN, mask_QN):
    scores_QN = scores_QN if scores_QN.dtype == torch.float64 else scores_QN.float()
    if mask_QN is None:
        mask_QN = torch.ones_like(scores_QN, dtype=torch.bool)
    return torch.where(mask_QN, scores_QN, 0), mask_QN


def triplet(scores_QN, positive_QN, *, margin=0.2, negatives="hardest", tau=0.05, mask_QN=None):
    """loss_Q: mean over a query's positives of [margin + negative - positive]+.

    >>> triplet(torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[True, False, False]]))
    tensor([0.1000])
    """
    scores_QN, mask_QN = _ready(scores_QN, mask_QN)
    positive_QN = positive_QN & mask_QN
    negative_QN = ~positive_QN & mask_QN
    count_Q = positive_QN.sum(-1).clamp(min=1)
    if negatives == "all":
        hinge_QNN = (margin + scores_QN[:, None, :] - scores_QN[:, :, None]).relu()
        pair_QNN = positive_QN[:, :, None] & negative_QN[:, None, :]
        return (hinge_QNN * pair_QNN).sum((1, 2)) / pair_QNN.sum((1, 2)).clamp(min=1)
    hidden_QN = scores_QN.masked_fill(~negative_QN, -torch.inf)
    hard_Q = hidden_QN.amax(-1) if negatives == "hardest" else tau * (hidden_QN / tau).logsumexp(-1)
    hinge_QN = (margin + hard_Q[:, None] - scores_QN).relu()
    return torch.where(positive_QN, hinge_QN, 0).sum(-1) / count_Q


def info_nce(scores_QN, positive_QN, *, temperature=0.05, mask_QN=None):
    """loss_Q: -log of the softmax mass that the scores give to the positives.

    >>> info_nce(torch.tensor([[0.5, 0.5]]), torch.tensor([[True, False]]))
    tensor([0.6931])
    """
    scores_QN, mask_QN = _ready(scores_QN, mask_QN)
    logits_QN = (scores_QN / temperature).masked_fill(~mask_QN, -torch.inf)
    positive_QN = positive_QN & mask_QN
    any_Q = positive_QN.any(-1)
    found_Q = logits_QN.masked_fill(~positive_QN & any_Q[:, None], -torch.inf).logsumexp(-1)
    return torch.where(any_Q, logits_QN.logsumexp(-1) - found_Q, 0)


LOSSES = {
    "smooth_ndcg": smooth_ndcg,
    "kendall_rank": kendall_rank,
    "triplet": triplet,
    "info_nce": info_nce,
    "soft_label_kl": soft_label_kl,
}
GRADED = {"smooth_ndcg", "kendall_rank", "soft_label_kl"}


def both_directions(loss, scores_QN, target_QN, **settings):
    """Scalar: the mean of the rows' losses and the mean of the columns' losses, halved.

    The columns see transposed scores and transposed targets, and every setting whose name ends in `_QN` transposed.

    >>> both_directions(triplet, torch.eye(2), torch.eye(2, dtype=torch.bool))
    tensor(0.)
    """
    turned = {k: v.T if k.endswith("_QN") and v is not None else v for k, v in settings.items()}
    return (loss(scores_QN, target_QN, **settings).mean() + loss(scores_QN.T, target_QN.T, **turned).mean()) / 2


def weighted_sum(terms, scores_QN, positive_QN, relevance_QN, *, mask_QN=None):
    """loss_Q: the sum of weight x loss over `terms`, a list of {"loss": name, "weight": w, **settings}.

    >>> weighted_sum([{"loss": "triplet", "weight": 2.0}], torch.eye(2), torch.eye(2) > 0, torch.eye(2))
    tensor([0., 0.])
    """
    total_Q = 0
    for term in terms:
        settings = {k: v for k, v in term.items() if k not in ("loss", "weight")}
        target_QN = relevance_QN if term["loss"] in GRADED else positive_QN
        loss_Q = LOSSES[term["loss"]](scores_QN, target_QN, mask_QN=mask_QN, **settings)
        total_Q = total_Q + term.get("weight", 1.0) * loss_Q
    return total_Q
