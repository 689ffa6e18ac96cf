"""Numbers of losses that are learned with the towers, as a recipe asks for them.

    temperature: learned                     from a pretrained model's, else the loss's default
    temperature: {learned: 0.07}             from 0.07
    tau: {follows: info_nce, times: 0.2}     0.2 x that loss's learned temperature, no gradient

A temperature T is learned as CLIP learns it, by the logarithm of 1 / T (its `logit_scale`), which
is kept from 0 to log 100: T from 0.01 to 1. A model that came with a greater scale (SigLIP's) keeps
it as its own upper end. SigLIP's `scale` is learned alike, its `bias` as it is.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.formulas.losses.registry import LOSSES

MOST = 100.0  # of a scale, as CLIP has it (arXiv 2103.00020)
TIMES = 0.2  # tau to temperature, of followers: S-NDCG's 0.01 to InfoNCE's 0.05
LEARNED, FOLLOWS = "learned", "follows"
TARGETS = ("target_temperature",)  # what the scores are held against is not to be learned
Losses = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A setting of a loss that is learned."""

    loss: str
    name: str
    start: float | None  # None: what a pretrained model came with, else the loss's default

    @property
    def key(self) -> str:
        """What its parameter is called."""
        return f"{self.loss}_{self.name}"

    def begins(self, came_with: Mapping[str, float]) -> float:
        """The parameter's first value. `came_with` are `logit_scale` and `logit_bias`."""
        known = {"temperature": "logit_scale", "scale": "logit_scale", "bias": "logit_bias"}
        if self.start is None and known.get(self.name) in came_with:
            return came_with[known[self.name]]
        start = self.start
        if start is None:
            start = inspect.signature(LOSSES[self.loss].function).parameters[self.name].default
        assert start is not None
        if self.name == "bias":
            return float(start)
        return math.log(start) if self.name == "scale" else -math.log(start)

    def value(self, parameter: Tensor) -> Tensor:
        """The setting of a parameter."""
        if self.name == "bias":
            return parameter * 1.0
        return parameter.exp() if self.name == "scale" else (-parameter).exp()


@dataclass(frozen=True)
class Follower:
    """A setting that is `times` another loss's learned temperature."""

    loss: str
    name: str
    leader: str
    times: float


class Learned:
    """Which settings of a recipe's losses are learned. Raises ValueError for those that cannot be.

    `settings` are learned, `followers` follow one of them, and `losses` is the recipe's without
    either: what is learned has its start there, followers what follows from it.
    """

    def __init__(self, losses: Losses, came_with: Mapping[str, float] | None = None):
        self.settings: list[Setting] = []
        self.followers: list[Follower] = []
        for loss, given in losses.items():
            for name, value in given.items():
                self._read(loss, name, value)
        for one in self.followers:
            if one.leader not in {setting.loss for setting in self.settings}:
                raise ValueError(
                    f"{one.loss}.{one.name} follows {one.leader}, which learns no temperature; "
                    f"give {one.leader}: {{temperature: learned}}"
                )
        self.starts = {one.key: one.begins(came_with or {}) for one in self.settings}
        values = self.values({k: torch.tensor(v) for k, v in self.starts.items()})
        numbers = {key: float(value) for key, value in values.items()}
        self.losses: dict[str, dict[str, Any]] = {
            loss: {name: numbers.get((loss, name), value) for name, value in given.items()}
            for loss, given in losses.items()
        }

    def _read(self, loss: str, name: str, value: Any) -> None:
        asked = isinstance(value, dict) and (LEARNED in value or FOLLOWS in value)
        if not (asked or value == LEARNED):
            return
        may = [n for n in getattr(LOSSES[loss].function, "learned", ()) if n not in TARGETS]
        if name not in may:
            known = f"{' and '.join(may)} may" if may else "nothing of it may"
            raise ValueError(f"{loss}.{name} cannot be learned ({known} be); give a number")
        if asked and FOLLOWS in value:
            self._follow(loss, name, value)
            return
        start = value[LEARNED] if asked else None
        sound = isinstance(start, int | float) and math.isfinite(start)
        if asked and not (len(value) == 1 and sound and (start > 0 or name == "bias")):
            raise ValueError(f"{loss}.{name} is learned from {value}; give {{learned: NUMBER}}")
        self.settings.append(Setting(loss, name, start))

    def _follow(self, loss: str, name: str, value: dict) -> None:
        times = value.get("times", TIMES)
        sound = isinstance(times, int | float) and math.isfinite(times) and times > 0
        if not sound or not {*value} <= {FOLLOWS, "times"} or name == "bias":
            raise ValueError(
                f"{loss}.{name}: {value} is no rule; give {{follows: LOSS, times: NUMBER}}"
            )
        self.followers.append(Follower(loss, name, value[FOLLOWS], float(times)))

    def __bool__(self) -> bool:
        return bool(self.settings)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """New parameters at their start, each a number, by name."""
        return {k: torch.nn.Parameter(torch.tensor(v)) for k, v in self.starts.items()}

    def values(self, parameters: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """By (loss, setting): what is learned, with its gradient, and what follows it, without."""
        values = {(s.loss, s.name): s.value(parameters[s.key]) for s in self.settings}
        of_loss = {
            s.loss: value.detach() if s.name != "scale" else 1 / value.detach()
            for s, value in zip(self.settings, values.values(), strict=True)
            if s.name != "bias"
        }
        followed = {(f.loss, f.name): f.times * of_loss[f.leader] for f in self.followers}
        return values | followed

    def told(self, values: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """What is learned, and what follows it, by the name it has in records."""
        return {f"{loss}_{setting}": value.detach() for (loss, setting), value in values.items()}

    @torch.no_grad()
    def clamp_(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep the scales within their ends; to be called after every step."""
        for one in self.settings:
            if one.name != "bias":
                most = max(math.log(MOST), self.starts[one.key])
                parameters[one.key].clamp_(0.0, most)


def scale_and_bias(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """`logit_scale` (a logarithm) and `logit_bias` as pretrained models have them; {} of none.

    Of several losses that learn one, the first one's.
    """
    found: dict[str, float] = {}
    for key, value in parameters.items():
        name = "logit_bias" if key.endswith("_bias") else "logit_scale"
        found.setdefault(name, float(value.detach()))
    return found
