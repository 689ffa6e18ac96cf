"""What all losses share: what they are given is checked, and their edges are alike."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Mask
from pipeline.formulas.kernels.gradients import refuse_learned
from pipeline.formulas.kernels.rows import prepared

F = TypeVar("F", bound=Function)


def of_lists(*, graded: bool, learned: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Makes a loss of a function that may take its lists for granted.

    It gets scores_QN of float32 or float64, N > 0, relevance_QN or boolean positive_QN, and
    mask_QN; what is masked out is 0. Whatever it returns, a query with a number that is not finite
    in its list has the loss and the gradient NaN. `learned` are the settings that may be tensors
    with a gradient. The loss may be told that all candidates are `scored`, none by -inf: then it
    does not look, and a device other than the processor carries no mask for it.
    """

    def decorator(function: F) -> F:
        @functools.wraps(function)
        def loss(
            scores_QN: Tensor,
            target_QN: Tensor,
            *,
            mask_QN: Mask = None,
            scored: bool = False,
            **settings: Any,
        ) -> Tensor:
            refuse_learned(function.__name__, settings, learned)
            if not graded and target_QN.dtype != torch.bool:
                raise ValueError(
                    f"positive_QN must be boolean, got {target_QN.dtype}; graded losses take "
                    "relevance"
                )
            lists = prepared(scores_QN, target_QN, mask_QN, unscored=not scored)
            scores_QN, target_QN, mask_QN = lists
            if scores_QN.shape[1] == 0:
                return scores_QN.sum(-1)
            loss_Q = function(scores_QN, target_QN, mask_QN=mask_QN, **settings)
            return loss_Q * _sound(scores_QN, target_QN)

        return cast(F, loss)

    return decorator


def _sound(scores_QN: Tensor, target_QN: Tensor) -> Tensor:
    """sound_Q: 1, or NaN for a query with NaN or inf in its list.

    Times the loss it takes NaN to value and gradient, past any comparison that would drop it.
    """
    # The extremes: a sum of finite numbers may be inf.
    sound_Q = scores_QN.detach().amax(-1).isfinite()
    if target_QN.dtype != torch.bool:
        least_Q, most_Q = target_QN.aminmax(dim=-1)
        sound_Q = sound_Q & least_Q.isfinite() & most_Q.isfinite()
    return torch.where(sound_Q, 1.0, torch.nan).to(scores_QN.dtype)
