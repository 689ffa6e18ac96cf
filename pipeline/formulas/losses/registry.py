"""The losses by name: a row each, and those of one's own."""

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.formulas.kernels import Function
from pipeline.formulas.kernels.lists import of_lists
from pipeline.formulas.losses import contrastive, kendall, listwise


@dataclass(frozen=True)
class Loss:
    """A loss as LOSSES has it, called like its function."""

    function: Function
    graded: bool  # its target is relevance, else boolean positives
    # Peak of a block of lists, forward and backward, in score matrices (4 R N bytes), as a device
    # without Triton has it: torch alone, the block of 256 x 2,048 at once. Kendall's are beside a
    # piece of the pairs, whose size does not depend on the block's.
    score_matrices: float

    def __call__(self, scores_QN: Tensor, target_QN: Tensor, **settings: Any) -> Tensor:
        return self.function(scores_QN, target_QN, **settings)


LOSSES = {
    "smooth_ndcg": Loss(listwise.smooth_ndcg, graded=True, score_matrices=18.9),
    "kendall_rank": Loss(kendall.kendall_rank, graded=True, score_matrices=9.5),
    "kendall_smooth": Loss(kendall.kendall_smooth, graded=True, score_matrices=5.8),
    "list_net": Loss(listwise.list_net, graded=True, score_matrices=6.1),
    "list_mle": Loss(listwise.list_mle, graded=True, score_matrices=17.1),
    "soft_label_kl": Loss(listwise.soft_label_kl, graded=True, score_matrices=7.1),
    "masked_info_nce": Loss(contrastive.masked_info_nce, graded=True, score_matrices=7.6),
    "adaptive_info_nce": Loss(contrastive.adaptive_info_nce, graded=True, score_matrices=7.3),
    "triplet": Loss(contrastive.triplet, graded=False, score_matrices=5.3),
    "info_nce": Loss(contrastive.info_nce, graded=False, score_matrices=6.3),
    "siglip": Loss(contrastive.siglip, graded=False, score_matrices=4.1),
}
UNKNOWN_SIZE = 20.0  # score matrices that one of one's own is taken to need: more than any here
GRADED = {name for name, loss in LOSSES.items() if loss.graded}


def loss_named(name: str) -> Loss:
    """A row of LOSSES, or one's own function as `package.module:function`.

    Raises ValueError where there is none, or where it is not called as losses are.
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise ValueError(
            f"no loss {name!r}: choose one of {', '.join(sorted(LOSSES))}, or "
            "package.module:function"
        )
    return _own(name)


@functools.cache
def _own(name: str) -> Loss:
    """A function (scores_QN, relevance_QN or positive_QN, *, mask_QN, **settings) -> loss_Q."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss {name!r} cannot be imported: {error}") from error
    taken = list(inspect.signature(function).parameters) if callable(function) else []
    kind = taken[1].partition("_")[0] if len(taken) > 1 else ""
    if kind not in ("relevance", "positive") or "mask_QN" not in taken[2:]:
        raise ValueError(
            f"loss {name!r} takes ({', '.join(taken)}); a loss takes (scores_QN, relevance_QN, *, "
            "mask_QN, …), or positive_QN in place of relevance_QN, and gives one value a query"
        )
    graded = kind == "relevance"
    if not hasattr(function, "learned"):  # its edges are to be those of all others
        function = of_lists(graded=graded)(function)
    return Loss(function, graded, UNKNOWN_SIZE)


def function_of(loss: str | Function) -> Function:
    """The function of a loss: of its name, of its row in LOSSES, or one of one's own as it is."""
    loss = loss_named(loss) if isinstance(loss, str) else loss
    return loss.function if isinstance(loss, Loss) else loss
