"""The losses by name: a row each."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.formulas.losses.contrastive import (
    adaptive_info_nce,
    info_nce,
    masked_info_nce,
    siglip,
    triplet,
)
from pipeline.formulas.losses.kendall import kendall_rank, kendall_smooth
from pipeline.formulas.losses.listwise import list_mle, list_net, smooth_ndcg, soft_label_kl


@dataclass(frozen=True)
class Loss:
    """A loss as LOSSES has it, called like its function."""

    function: Callable
    graded: bool  # its target is relevance, else boolean positives
    # Peak of forward and backward of both directions in score matrices (4 Q N bytes), torch alone,
    # measured on 1,024 x 1,024 (kendall_smooth 512).
    score_matrices: float

    def __call__(self, scores_QN, target_QN, **settings):
        return self.function(scores_QN, target_QN, **settings)


LOSSES = {
    "smooth_ndcg": Loss(smooth_ndcg, graded=True, score_matrices=5.4),
    "kendall_rank": Loss(kendall_rank, graded=True, score_matrices=7.4),
    "kendall_smooth": Loss(kendall_smooth, graded=True, score_matrices=5.8),
    "list_net": Loss(list_net, graded=True, score_matrices=8.1),
    "list_mle": Loss(list_mle, graded=True, score_matrices=24.4),
    "soft_label_kl": Loss(soft_label_kl, graded=True, score_matrices=9.1),
    "masked_info_nce": Loss(masked_info_nce, graded=True, score_matrices=9.1),
    "adaptive_info_nce": Loss(adaptive_info_nce, graded=True, score_matrices=8.6),
    "triplet": Loss(triplet, graded=False, score_matrices=4.6),
    "info_nce": Loss(info_nce, graded=False, score_matrices=8.6),
    "siglip": Loss(siglip, graded=False, score_matrices=6.1),
}
GRADED = {name for name, loss in LOSSES.items() if loss.graded}


def function_of(loss) -> Callable:
    """The function of a loss: of its name, of its row in LOSSES, or one of one's own as it is."""
    loss = LOSSES.get(loss, loss)
    return loss.function if isinstance(loss, Loss) else loss
