"""A weighted sum of losses, any number of which may follow a schedule."""

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.kernels import Mask
from pipeline.formulas.kernels.rows import loss_dtype
from pipeline.formulas.losses.registry import LOSSES

SHAPES = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "jump": lambda done: float(done >= 1),
}


def scheduled(value: Any, time: float) -> Any:
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
    numbers: list[Any] = [given.get(name) for name in ("from", "to", "over", "start")]
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
    is summed, by name, and `each` one after the other. A loss costs nothing while its weight is 0,
    and where that is so of all graded ones (`graded_at` a time) relevance may be None.

    >>> import torch
    >>> warm = {"from": 0.0, "to": 1.0, "over": 100}
    >>> loss = WeightedSum({"triplet": {"mining": warm}, "smooth_ndcg": {"weight": 4.0}})
    >>> loss(torch.eye(2), torch.eye(2) > 0, torch.eye(2), time=50)
    tensor([0., 0.])
    """

    def __init__(self, losses: Mapping[str, Mapping[str, Any]]):
        self.losses = {name: {"weight": 1.0, **settings} for name, settings in losses.items()}
        if not self.losses:
            raise ValueError("a weighted sum needs at least one loss")
        for name, settings in self.losses.items():
            if name not in LOSSES:
                raise ValueError(f"no loss {name!r}: choose one of {', '.join(sorted(LOSSES))}")
            parameters = list(inspect.signature(LOSSES[name].function).parameters)
            known = {"weight", *parameters[2:]} - {"mask_QN"}
            if unknown := set(settings) - known:
                raise ValueError(
                    f"no setting {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}"
                )
            if not isinstance(scheduled(settings["weight"], 0), int | float):
                raise ValueError(f"the weight must be a number, got {settings['weight']!r}")
            for value in settings.values():
                scheduled(value, 0)

    @property
    def learned(self) -> list[Tensor]:
        """The settings that are tensors with a gradient."""
        values = (value for settings in self.losses.values() for value in settings.values())
        return [value for value in values if torch.is_tensor(value) and value.requires_grad]

    def having(self, values: Mapping[tuple[str, str], Any]) -> "WeightedSum":
        """The same with other values of some settings, by (loss, setting)."""
        other = WeightedSum.__new__(WeightedSum)
        other.losses = {name: dict(settings) for name, settings in self.losses.items()}
        for (name, setting), value in values.items():
            other.losses[name][setting] = value
        return other

    def graded_at(self, time: float) -> bool:
        """Whether relevance plays a part at a time: a graded loss has a weight then."""
        weights = (
            settings["weight"] for name, settings in self.losses.items() if LOSSES[name].graded
        )
        return any(scheduled(weight, time) for weight in weights)

    def __call__(self, *matrices: Tensor, **given: Any) -> Tensor:
        return functools.reduce(torch.add, self.terms(*matrices, **given).values())

    def terms(self, *matrices: Tensor, **given: Any) -> dict[str, Tensor]:
        """{name: weight x loss_Q}, given what `each` is."""
        return dict(self.each(*matrices, **given))

    def each(
        self,
        scores_QN: Tensor,
        positive_QN: Tensor,
        relevance_QN: Tensor | None,
        *,
        time: float = 0,
        mask_QN: Mask = None,
        scored: bool = False,
        score_range: float | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, weight x loss_Q) at that time.

        `scored`: it is known that no score is -inf; `score_range`: how far apart they can be.
        """
        for name, settings in self.losses.items():
            now = {setting: scheduled(value, time) for setting, value in settings.items()}
            weight = now.pop("weight")
            if weight == 0:  # of no candidates: zeros through which a gradient can still flow
                yield name, scores_QN[:, :0].to(loss_dtype(scores_QN)).sum(-1)
                continue
            target_QN = relevance_QN if LOSSES[name].graded else positive_QN
            if target_QN is None:
                raise ValueError(f"{name} takes relevance, and there is none")
            now |= {"mask_QN": mask_QN, "scored": scored}
            if score_range is not None:  # one in the recipe would be a narrower one
                now.setdefault("score_range", score_range)
            yield name, weight * LOSSES[name](scores_QN, target_QN, **now)
