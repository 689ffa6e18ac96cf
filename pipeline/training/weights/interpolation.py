"""Weights between those before training and the trained ones, chosen on val (WiSE-FT).

Tuning a pretrained model wins on the data it is tuned on and loses elsewhere; a share of the way
often keeps both. Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, Eq. 1:

    weights(α) = (1 - α) before + α trained
"""

from typing import Any, Protocol, cast

import torch
from safetensors.torch import load, save

from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.training.checkpoint import Tensors, whole
from pipeline.training.loop import CHOSEN_BY, Loop

BEFORE = "before.safetensors"  # beside the checkpoints: what is trained, as it was before
# Low-rank updates are a product, B A, of which B is 0 before training: with the trained A, what is
# linear in B is linear in the update, so α scales the update.
KEPT = ".lora_A."


def between(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Weights by name, `share` of the way from `before` to `after`; counts are those after."""
    if strangers := before.keys() ^ after.keys():
        raise InputError(
            f"the weights before training are of another model ({len(strangers)} tensors, such as "
            f"{min(strangers)}); train without --resume"
        )

    def mixed(name: str, value: torch.Tensor) -> torch.Tensor:
        if share == 1 or KEPT in name:
            return value
        if share == 0:
            return before[name]
        if not value.is_floating_point():
            return value
        return torch.lerp(before[name].float(), value.float(), share).to(value.dtype)

    return {name: mixed(name, value) for name, value in after.items()}


class Towers(Protocol):
    """What is asked of a `TowerTrainer`."""

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights and buffers that training changes; every worker calls it."""

    def validate_with(self, weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        """Figures on val of such weights, and these with their batch norms' moments."""


class Interpolation:
    """What `train.interpolate` makes of the chosen checkpoint's weights: a `loop.Finish`."""

    def __init__(self, shares: tuple[float, ...]):
        self.shares = shares

    def begin(self, loop: Loop) -> None:
        """Keep the weights that training is going to change."""
        copies = whole({"": cast(Towers, loop.trainer).trained()}, loop.world.rank == 0)
        if loop.world.rank == 0:
            store.write_bytes(store.join(loop.checkpoints, BEFORE), save(copies[""]))

    def weights(self, loop: Loop, found: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The weights best on val, and the curve: figures on val by α."""
        uri, trainer = store.join(loop.checkpoints, BEFORE), cast(Towers, loop.trainer)
        if not store.exists(uri):
            raise InputError(
                "train.interpolate needs the weights before training, and this one goes on from a "
                "checkpoint of one without it; train without --resume"
            )
        before, by = load(store.read_bytes(uri)), CHOSEN_BY.get(loop.course.select, "val/rsum")
        curve, best = [], None
        for share in reversed(self.shares):  # of equals the most trained
            figures, weights = trainer.validate_with(between(before, found["model"], share))
            curve.append({"alpha": share, **figures})
            if best is None or figures[by] > best[0]:
                best = figures[by], share, figures, weights
        assert best is not None
        _, share, figures, weights = best
        zero = curve[-1]["val/rsum"]  # α = 0
        told = {**figures, "val/rsum_over_zero_shot": figures["val/rsum"] - zero}
        return weights, {"alpha": share, "interpolation": curve[::-1], "metrics": told}
