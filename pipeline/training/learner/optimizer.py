"""What moves the weights: torch's optimizers, fused where a GPU is, and the rate at each step."""

import math
import re

import torch

from pipeline.models import TwoTower
from schemas.settings import TrainSettings

PLACES = re.compile(r"pos(ition(al)?)?_?emb|class_emb|cls_token|relative_position")
KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_of(model: TwoTower, settings: TrainSettings) -> torch.optim.Optimizer:
    """Parameters grouped by their share of the learning rate and by whether they decay.

    A tower may have a rate of its own, and what the losses learn has. Decay is for matrices:
    vectors (biases, norms, class tokens) and single numbers have none, nor, with `no_decay`
    embeddings, have position embeddings.

    Fused on a GPU: one kernel a group, which waits for nothing, the scale of fp16 included. On
    processors torch's plain loop, whose numbers are those of every training so far.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = settings.temperature_lr if name.startswith("learned.") else model.lr_of(name)
            scale = model.lr_scale(name) * (own / settings.lr if own else 1.0)
            key = (scale, parameter.ndim > 1 and not _spared(name, settings))
            groups.setdefault(key, []).append(parameter)
    arguments = []
    for (scale, decays), parameters in groups.items():
        decay = settings.weight_decay if decays else 0.0
        arguments.append({"params": parameters, "lr_scale": scale, "weight_decay": decay})
    every = [parameter for parameters in groups.values() for parameter in parameters]
    how: dict = {"lr": settings.lr, "fused": _can_fuse(every) or None}
    if settings.optimizer == "sgd":
        how["momentum"] = settings.momentum
    else:
        how |= {"betas": settings.betas, "eps": settings.eps}
    return KINDS[settings.optimizer](arguments, **how)


def _spared(name: str, settings: TrainSettings) -> bool:
    """Whether a matrix does not decay: it is one of positions, a vector for each."""
    return settings.no_decay == "embeddings" and PLACES.search(name) is not None


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
