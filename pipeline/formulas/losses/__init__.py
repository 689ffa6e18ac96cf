"""All losses by name, both directions of a batch, and weighted sums with schedules.

A loss is `f(scores_QN, target_QN, *, mask_QN=None, **settings) -> loss_Q`: one value per query,
lower is better; the caller averages. The target is `relevance_QN` for the names in GRADED and
boolean `positive_QN` for the others. `mask_QN` is True for candidates in the list. Lists may be of
any shape Q x N: a batch, some rows of a global batch, or queries against a memory bank. Scores of
less than float32 are taken to float32.
To add one: a function, a line here, and its slow twin in tests/reference.py.

Legend of the shape suffixes: Q queries, N candidates of a query.
"""

import inspect
import math

import torch
from torch.autograd.function import once_differentiable

from pipeline.formulas.kernels.rows import (
    add_block_,
    block_of,
    blocks,
    loss_dtype,
    rows_in_cache,
    summed,
)
from pipeline.formulas.losses.contrastive import (
    adaptive_info_nce,
    info_nce,
    masked_info_nce,
    siglip,
    triplet,
)
from pipeline.formulas.losses.kendall import kendall_rank, kendall_smooth
from pipeline.formulas.losses.listwise import list_mle, list_net, smooth_ndcg, soft_label_kl

LOSSES = {
    "smooth_ndcg": smooth_ndcg,
    "kendall_rank": kendall_rank,
    "kendall_smooth": kendall_smooth,
    "list_net": list_net,
    "list_mle": list_mle,
    "soft_label_kl": soft_label_kl,
    "masked_info_nce": masked_info_nce,
    "adaptive_info_nce": adaptive_info_nce,
    "triplet": triplet,
    "info_nce": info_nce,
    "siglip": siglip,
}
GRADED = {
    "smooth_ndcg",
    "kendall_rank",
    "kendall_smooth",
    "list_net",
    "list_mle",
    "soft_label_kl",
    "masked_info_nce",
    "adaptive_info_nce",
}


def both_directions(loss, scores_QN, target_QN, **settings):
    """Scalar: the mean of the rows' losses and the mean of the columns' losses, halved.

    The columns see transposed scores and transposed targets, and every setting whose name ends in
    `_QN` transposed. `loss` is a function or a name of LOSSES.

    >>> import torch
    >>> both_directions("triplet", torch.eye(2), torch.eye(2, dtype=torch.bool))
    tensor(0.)
    """
    loss = LOSSES.get(loss, loss)
    learned = any(torch.is_tensor(value) and value.requires_grad for value in settings.values())
    if (
        scores_QN.requires_grad
        and loss in LOSSES.values()
        and not learned
        and "average" not in settings
    ):
        return _BothDirections.apply(scores_QN, loss, target_QN, settings)
    of_rows = loss(scores_QN, target_QN, **settings).mean()
    return (of_rows + loss(scores_QN.T, target_QN.T, **_turned(settings)).mean()) / 2


def _turned(settings):
    return {k: v.T if k.endswith("_QN") and v is not None else v for k, v in settings.items()}


class _BothDirections(torch.autograd.Function):
    """Block by block into one gradient matrix: half the memory of two losses side by side.

    The backward pass gives that matrix away; should it be called again, it is computed again.
    """

    @staticmethod
    def forward(ctx, scores_QN, loss, target_QN, settings):
        ctx.save_for_backward(scores_QN, target_QN)
        ctx.loss, ctx.settings = loss, settings
        total, ctx.gradient_QN = _both_ways(scores_QN, loss, target_QN, settings)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradient_QN, ctx.gradient_QN = ctx.gradient_QN, None
        if gradient_QN is None:
            scores_QN, target_QN = ctx.saved_tensors
            _, gradient_QN = _both_ways(scores_QN, ctx.loss, target_QN, ctx.settings)
        return gradient_QN.mul_(grad), None, None, None


def _both_ways(scores_QN, loss, target_QN, settings):
    """(loss, gradient_QN) of both directions."""
    gradient_QN = torch.zeros_like(scores_QN, memory_format=torch.contiguous_format)
    total = torch.zeros((), dtype=torch.float64, device=scores_QN.device)
    for scores, target, given, gradient in (
        (scores_QN, target_QN, settings, gradient_QN),
        (scores_QN.T, target_QN.T, _turned(settings), gradient_QN.T),
    ):
        for rows in blocks(len(scores), rows_in_cache(scores.shape[1] // 4, scores.device)):
            total += _add_block(loss, scores, target, given, rows, gradient)
    return total.to(loss_dtype(scores_QN)), gradient_QN


def _add_block(loss, scores_QN, target_QN, settings, rows, gradient_QN):
    """The loss of these rows, as a part of half the mean; adds its gradient to gradient_QN."""
    settings = {
        k: block_of(v, rows) if k.endswith("_QN") and v is not None else v
        for k, v in settings.items()
    }
    half_mean = 0.5 / len(scores_QN)
    value, part_RN = summed(loss, block_of(scores_QN, rows), block_of(target_QN, rows), **settings)
    add_block_(gradient_QN, rows, part_RN, half_mean)
    return value * half_mean


SHAPES = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "jump": lambda done: float(done >= 1),
}


def scheduled(value, time):
    """The number that a setting has at a time: itself, or on its way between two numbers.

    A schedule is {"from": a, "to": b, "over": t} with optional "start" (a time, 0) and "shape":
    `linear`, `cosine` or `jump` (a until the end, then b). Before it a holds, after it b. Times
    may have any unit: steps in a loop of your own, epochs in a recipe.

    >>> ramp = {"from": 0.0, "to": 1.0, "over": 10, "start": 5}
    >>> [scheduled(ramp, time) for time in (0, 10, 99)], scheduled(0.2, 7)
    ([0.0, 0.5, 1.0], 0.2)
    """
    if not isinstance(value, dict):
        return value
    given = {"start": 0, "shape": "linear", **value}
    numbers = [given.get(name) for name in ("from", "to", "over", "start")]
    sound = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
    if not sound or len(given) > 5 or given["shape"] not in list(SHAPES) or given["over"] < 0:
        raise ValueError(
            "a schedule is {from, to, over} and if need be start, all numbers, and shape "
            f"({', '.join(SHAPES)}); got {value}"
        )
    first, last, over, start = numbers
    done = min(1.0, max(0.0, (time - start) / over)) if over else float(time >= start)
    done = SHAPES[given["shape"]](done)
    return first * (1 - done) + last * done


class WeightedSum:
    """A loss made of weighted losses, as a recipe has them; any number in it may be a schedule.

    Made of {a name of LOSSES: {"weight": 1.0, and settings of that loss}}, called as
    `loss(scores_QN, positive_QN, relevance_QN, time=0, mask_QN=None) -> loss_Q`. `terms` gives what
    is summed, by name. A loss costs nothing while its weight is 0.

    >>> import torch
    >>> warm = {"from": 0.0, "to": 1.0, "over": 100}
    >>> loss = WeightedSum({"triplet": {"mining": warm}, "smooth_ndcg": {"weight": 4.0}})
    >>> loss(torch.eye(2), torch.eye(2) > 0, torch.eye(2), time=50)
    tensor([0., 0.])
    """

    def __init__(self, losses):
        self.losses = {name: {"weight": 1.0, **settings} for name, settings in losses.items()}
        if not self.losses:
            raise ValueError("a weighted sum needs at least one loss")
        for name, settings in self.losses.items():
            if name not in LOSSES:
                raise ValueError(f"no loss {name!r}: choose one of {', '.join(sorted(LOSSES))}")
            known = {"weight", *list(inspect.signature(LOSSES[name]).parameters)[2:]} - {"mask_QN"}
            if unknown := set(settings) - known:
                raise ValueError(
                    f"no setting {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}"
                )
            if not isinstance(scheduled(settings["weight"], 0), int | float):
                raise ValueError(f"the weight must be a number, got {settings['weight']!r}")
            for value in settings.values():
                scheduled(value, 0)

    def __call__(self, *matrices, **given):
        return sum(self.terms(*matrices, **given).values())

    def terms(self, scores_QN, positive_QN, relevance_QN, *, time=0, mask_QN=None):
        """{name: weight x loss_Q} at that time."""
        terms = {}
        for name, settings in self.losses.items():
            now = {setting: scheduled(value, time) for setting, value in settings.items()}
            weight = now.pop("weight")
            if weight == 0:  # of no candidates: zeros through which a gradient can still flow
                terms[name] = scores_QN[:, :0].to(loss_dtype(scores_QN)).sum(-1)
            else:
                target_QN = relevance_QN if name in GRADED else positive_QN
                terms[name] = weight * LOSSES[name](scores_QN, target_QN, mask_QN=mask_QN, **now)
        return terms
