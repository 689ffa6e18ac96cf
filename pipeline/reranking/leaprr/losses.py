"""What LeaPRR is trained with: contrastive, triplet and hinge losses, and cross-modal alignment.

Each loss has one value a query. Legend of the shape suffixes: B queries, K candidates.
"""

import torch
from torch.nn import functional as F

from pipeline.formulas.losses import info_nce, triplet
from schemas.settings import LeaPRRSettings


def refinement(refined_BK, initial_BK, positive_BK, settings: LeaPRRSettings) -> torch.Tensor:
    """loss_B of refined scores: the weighted sum without alignment, 0 where nothing is to tell.

    Where all candidates are positive, or none, there is nothing to learn.
    """
    s = settings
    loss_B = info_nce(refined_BK, positive_BK, temperature=s.temperature)
    if s.triplet:
        hardest_BK = hardest_positive(refined_BK, positive_BK)
        rivals_BK = hardest_BK | ~positive_BK
        hinge_B = triplet(refined_BK, hardest_BK, margin=s.margin, mask_QN=rivals_BK)
        loss_B = loss_B + s.triplet * hinge_B
    if s.hinge:
        lowest_B1 = initial_BK.amin(1, keepdim=True)
        loss_B = loss_B + s.hinge * (lowest_B1 - refined_BK).relu().mean(1)
    return loss_B * (positive_BK.any(1) & ~positive_BK.all(1))


def hardest_positive(scores_BK, positive_BK) -> torch.Tensor:
    """True (B, K) at each query's positive of the lowest score; nowhere without positives."""
    lowest_B = scores_BK.masked_fill(~positive_BK, torch.inf).argmin(1)
    return F.one_hot(lowest_B, scores_BK.shape[1]).bool() & positive_BK


def alignment(mine_BK, theirs_BK, temperature: float) -> torch.Tensor:
    """loss_B: KL of an image's distribution over texts to its caption's over those texts' images.

    Σ_k p_k (log p_k − log q_k), p = softmax(mine / temperature), q = softmax(theirs / temperature).
    """
    log_p, log_q = (F.log_softmax(s / temperature, dim=1) for s in (mine_BK, theirs_BK))
    return (log_p.exp() * (log_p - log_q)).sum(1)
