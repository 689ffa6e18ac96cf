"""Batch norms of towers whose weights were averaged: no mean of moments is theirs."""

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models import TwoTower, Vocabulary
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.training.data import Split
from schemas.settings import Recipe

SEEN, TOGETHER = 2048, 128  # train images and captions that moments are taken of; at a time


def has_any(model: TwoTower) -> bool:
    return any(_keeps(module) for module in model.modules())


@torch.no_grad()
def renew(
    model: TwoTower,
    vocabulary: Vocabulary | PretrainedTokens,
    train: Split,
    recipe: Recipe,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Give batch norms the moments of train images and captions; those buffers by name.

    Each batch counts alike. The model is in evaluation mode before and after. Those that are frozen
    stay as they are; {} where there are no others.
    """
    still = {id(module) for tuned in model.tuned.values() for module in tuned.still}
    found = {n: m for n, m in model.named_modules() if _keeps(m) and id(m) not in still}
    if not found:
        return {}
    kept = [module.momentum for module in found.values()]
    for module in found.values():
        module.reset_running_stats()
        module.momentum = None  # the mean of all batches
        module.train()
    _pass(model, vocabulary, train, recipe.model.max_words, device)
    for module, momentum in zip(found.values(), kept, strict=True):
        module.momentum = momentum
        module.eval()
    return {
        f"{name}.{buffer}": value.detach().cpu().clone()
        for name, module in found.items()
        for buffer, value in module.named_buffers(recurse=False)
    }


def _pass(model, vocabulary, train: Split, max_words: int, device: torch.device) -> None:
    """The first images and captions of train, which are in random order, through the towers."""
    for start in range(0, min(SEEN, len(train)), TOGETHER):
        rows = range(start, min(start + TOGETHER, len(train)))
        if len(rows) > 1:  # a norm needs two
            images = torch.from_numpy(np.stack([train.image(row) for row in rows]))
            model.image(images.to(device))
    for start in range(0, min(SEEN, len(train.captions)), TOGETHER):
        of_texts = np.arange(start, min(start + TOGETHER, len(train.captions)))
        words, lengths = vocabulary.encode(train.texts(of_texts), max_words)
        if len(of_texts) > 1:
            model.text(words.to(device), lengths)


def _keeps(module: nn.Module) -> bool:
    """Whether a module keeps moments of what went through it in training."""
    return isinstance(module, _BatchNorm) and module.track_running_stats
