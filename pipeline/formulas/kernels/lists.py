"""What all losses share: what they are given is checked, and their edges are alike."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pipeline.formulas.kernels import Function, Mask, Settings
from pipeline.formulas.kernels.fused import Fused, Run, loss_of, takes
from pipeline.formulas.kernels.gradients import refuse_learned
from pipeline.formulas.kernels.rows import check_shapes, prepared

F = TypeVar("F", bound=Function)
Fuse = Callable[..., Fused | None]


def of_lists(
    *, graded: bool, learned: tuple[str, ...] = (), fused: Fuse | None = None
) -> Callable[[F], F]:
    """Makes a loss of a function that may take its lists for granted.

    It gets scores_QN of float32 or float64, N > 0, relevance_QN or boolean positive_QN, and
    mask_QN; what is masked out is 0. Whatever it returns, a query with a number that is not finite
    in its list has the loss and the gradient NaN. `learned` are the settings that may be tensors
    with a gradient; the loss has their names as its attribute of that name. It may be told that all
    candidates are `scored`, none by -inf: then it does not look, and a device other than the
    processor carries no mask for it. It may be told the `score_range`, the greatest score less the
    least one (2 for cosines): a function that has that setting gets it.

    `fused(scores_QN, target_QN, mask_QN, **settings)` gives the one kernel that does all of it,
    where it can; the loss has it as its attribute of that name, called as the loss is.
    """

    def decorator(function: F) -> F:
        of = _Loss(function, graded, learned, fused)

        @functools.wraps(function)
        def loss(
            scores_QN: Tensor,
            target_QN: Tensor,
            *,
            mask_QN: Mask = None,
            scored: bool = False,
            **settings: Any,
        ) -> Tensor:
            return of(scores_QN, target_QN, mask_QN, scored, settings)

        loss.fused = of.kernel_alone  # type: ignore[attr-defined]
        loss.learned = learned  # type: ignore[attr-defined]
        return cast(F, loss)

    return decorator


class _Loss:
    """What `of_lists` makes of a function."""

    def __init__(
        self, function: Function, graded: bool, learned: tuple[str, ...], fused: Fuse | None
    ):
        self.function, self.graded, self.learned, self.fused = function, graded, learned, fused
        self.ranged = "score_range" in inspect.signature(function).parameters

    def __call__(
        self,
        scores_QN: Tensor,
        target_QN: Tensor,
        mask_QN: Mask,
        scored: bool,
        settings: Settings,
    ) -> Tensor:
        def in_torch(scores_QN: Tensor, settings: Settings) -> Tensor:
            lists = prepared(scores_QN, target_QN, mask_QN, unscored=not scored)
            return self._in_torch(*lists, settings)

        settings = self._checked(scores_QN, target_QN, mask_QN, settings)
        if found := self._kernel(scores_QN, target_QN, mask_QN, settings):
            scores_QN, run, given = found
            return loss_of(scores_QN, run, lambda own: in_torch(own, given))
        return in_torch(scores_QN, settings)

    def kernel_alone(
        self,
        scores_QN: Tensor,
        target_QN: Tensor,
        *,
        mask_QN: Mask = None,
        scored: bool = False,
        **settings: Any,
    ) -> Run | None:
        """The kernel of these very scores, where there is one."""
        settings = self._checked(scores_QN, target_QN, mask_QN, settings)
        found = self._kernel(scores_QN, target_QN, mask_QN, settings)
        return found[1] if found and found[0] is scores_QN else None

    def _checked(
        self, scores_QN: Tensor, target_QN: Tensor, mask_QN: Mask, given: Settings
    ) -> Settings:
        """The settings as the function takes them."""
        refuse_learned(self.function.__name__, given, self.learned)
        if not self.graded and target_QN.dtype != torch.bool:
            raise ValueError(
                f"positive_QN must be boolean, got {target_QN.dtype}; graded losses take relevance"
            )
        check_shapes(scores_QN, target_QN, mask_QN)
        return {k: v for k, v in given.items() if k != "score_range" or self.ranged}

    def _kernel(
        self, scores_QN: Tensor, target_QN: Tensor, mask_QN: Mask, settings: Settings
    ) -> Fused | None:
        if self.fused is None or not takes(scores_QN, target_QN):
            return None
        return self.fused(scores_QN, target_QN, mask_QN, **settings)

    def _in_torch(
        self, scores_QN: Tensor, target_QN: Tensor, mask_QN: Mask, settings: Settings
    ) -> Tensor:
        if scores_QN.shape[1] == 0:
            return scores_QN.sum(-1)
        loss_Q = self.function(scores_QN, target_QN, mask_QN=mask_QN, **settings)
        return loss_Q * _sound(scores_QN, target_QN)


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
