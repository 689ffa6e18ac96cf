"""What moves the weights: torch's optimizers, fused where a GPU is, and the rate at each step."""

import math

import torch

from pipeline.models import TwoTower
from schemas.settings import TrainSettings

KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_of(model: TwoTower, settings: TrainSettings) -> torch.optim.Optimizer:
    """Parameters grouped by their share of the learning rate and by whether they decay.

    Fused on a GPU: one kernel a group, which waits for nothing, the scale of fp16 included. On
    processors torch's plain loop, whose numbers are those of every training so far.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (model.lr_scale(name), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    arguments = []
    for (scale, decays), parameters in groups.items():
        decay = settings.weight_decay if decays else 0.0
        arguments.append({"params": parameters, "lr_scale": scale, "weight_decay": decay})
    every = [parameter for parameters in groups.values() for parameter in parameters]
    how: dict = {"lr": settings.lr, "fused": _can_fuse(every) or None}
    if settings.optimizer == "sgd":
        how["momentum"] = settings.momentum
    return KINDS[settings.optimizer](arguments, **how)


def _can_fuse(parameters: list[torch.Tensor]) -> bool:
    return all(p.device.type == "cuda" and p.is_floating_point() for p in parameters)


def lr_factor(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied with at a step: a linear rise, then the schedule."""
    rise = settings.lr_warmup * steps_per_epoch
    if step < rise:
        return (step + 1) / math.ceil(rise)
    done = (step - rise) / max(1, steps_per_epoch * settings.epochs - rise)
    return {
        "constant": 1.0,
        "step": 1.0 if done < 2 / 3 else 0.1,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[settings.lr_schedule]
