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

from pipeline.formulas._rows import add_block_, block_of, blocks, loss_dtype, rows_in_cache, summed
from pipeline.formulas.contrastive_losses import (
    adaptive_info_nce,
    info_nce,
    masked_info_nce,
    siglip,
    triplet,
)
from pipeline.formulas.kendall_losses import kendall_rank, kendall_smooth
from pipeline.formulas.listwise_losses import list_mle, list_net, smooth_ndcg, soft_label_kl

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
    """Block by block into one gradient matrix: half the memory of two losses side by side."""

    @staticmethod
    def forward(ctx, scores_QN, loss, target_QN, settings):
        gradient_QN = torch.zeros_like(scores_QN, memory_format=torch.contiguous_format)
        total = 0
        for scores, target, given, gradient in (
            (scores_QN, target_QN, settings, gradient_QN),
            (scores_QN.T, target_QN.T, _turned(settings), gradient_QN.T),
        ):
            half_mean = 0.5 / max(1, len(scores))
            for rows in blocks(len(scores), rows_in_cache(scores.shape[1] // 4, scores.device)):
                some = {
                    k: v[rows] if k.endswith("_QN") and v is not None else v
                    for k, v in given.items()
                }
                loss_sum, part = summed(loss, block_of(scores, rows), target[rows], **some)
                total = total + loss_sum * half_mean
                add_block_(gradient, rows, part, half_mean)
        ctx.save_for_backward(gradient_QN)
        return torch.as_tensor(total, device=scores_QN.device).to(loss_dtype(scores_QN))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient_QN,) = ctx.saved_tensors
        return gradient_QN * grad, None, None, None


SHAPES = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "jump": lambda done: float(done >= 1),
}


def scheduled(value, step):
    """The number that a setting has at a step: itself, or on its way between two numbers.

    A schedule is {"from": a, "to": b, "steps": n} with optional "start" (a step, 0) and "shape":
    `linear`, `cosine` or `jump` (a until the last step, then b). Before it a holds, after it b.

    >>> ramp = {"from": 0.0, "to": 1.0, "steps": 10, "start": 5}
    >>> [scheduled(ramp, step) for step in (0, 10, 99)], scheduled(0.2, 7)
    ([0.0, 0.5, 1.0], 0.2)
    """
    if not isinstance(value, dict):
        return value
    unknown = set(value) - {"from", "to", "steps", "start", "shape"}
    shape = value.get("shape", "linear")
    if unknown or not {"from", "to", "steps"} <= set(value) or shape not in SHAPES:
        raise ValueError(
            f"a schedule has from, to, steps, start, shape ({', '.join(SHAPES)}), got {value}"
        )
    done = (step - value.get("start", 0)) / max(1, value["steps"])
    done = SHAPES[shape](min(1.0, max(0.0, done)))
    return value["from"] + (value["to"] - value["from"]) * done


class WeightedSum:
    """A loss made of weighted losses, from a recipe's terms; any number may be a schedule.

    `sum(scores_QN, positive_QN, relevance_QN, step=0, mask_QN=None) -> loss_Q`. A term is {"loss":
    a name of LOSSES, "weight": 1.0, and settings of that loss}. A term of weight 0 costs nothing.

    >>> import torch
    >>> warm = {"from": 0.0, "to": 1.0, "steps": 100}
    >>> terms = [{"loss": "triplet", "mining": warm}, {"loss": "smooth_ndcg", "weight": 4.0}]
    >>> loss = WeightedSum(terms)
    >>> loss(torch.eye(2), torch.eye(2) > 0, torch.eye(2), step=50)
    tensor([0., 0.])
    """

    def __init__(self, terms):
        self.terms = [dict(term) for term in terms]
        if not self.terms:
            raise ValueError("a weighted sum needs at least one term")
        for term in self.terms:
            if term.get("loss") not in LOSSES:
                raise ValueError(
                    f"no loss {term.get('loss')!r}: choose one of {', '.join(sorted(LOSSES))}"
                )
            known = list(inspect.signature(LOSSES[term["loss"]]).parameters)[2:] + [
                "loss",
                "weight",
            ]
            if unknown := set(term) - set(known):
                raise ValueError(
                    f"{term['loss']} has no setting {', '.join(unknown)}: it has {', '.join(known)}"
                )
            for value in term.values():
                scheduled(value, 0)

    def __call__(self, scores_QN, positive_QN, relevance_QN, *, step=0, mask_QN=None):
        total_Q = scores_QN.new_zeros(len(scores_QN))
        for term in self.terms:
            settings = {name: scheduled(value, step) for name, value in term.items()}
            name, weight = settings.pop("loss"), settings.pop("weight", 1.0)
            if weight != 0:
                target_QN = relevance_QN if name in GRADED else positive_QN
                loss_Q = LOSSES[name](scores_QN, target_QN, mask_QN=mask_QN, **settings)
                total_Q = total_Q + weight * loss_Q
        return total_Q
