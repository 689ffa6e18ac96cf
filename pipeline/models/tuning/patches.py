"""Patches left out of a training step (FLIP, arXiv 2212.00794): faster, and some regularisation."""

import math
from typing import Any

import torch
from torch import nn


def drop(encoder: nn.Module, share: float) -> None:
    """Have a vision model see 1 - `share` of an image's patches while it is trained.

    Which ones is drawn anew for each image and step; tokens before the patches (a class token)
    stay. The model is one of Hugging Face's, whose `embeddings` give (B, tokens, width).
    """
    embeddings = getattr(encoder, "embeddings", None)
    config: Any = getattr(encoder, "config", None)
    sides = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not (isinstance(embeddings, nn.Module) and all(isinstance(side, int) for side in sides)):
        raise ValueError("patch_dropout: the tower cuts no image into patches; set it to 0")

    def kept(module: nn.Module, given: tuple, tokens_BTW: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return tokens_BTW
        batch, tokens, width = tokens_BTW.shape
        patches = _patches(given, int(sides[1])) or (int(sides[0]) // int(sides[1])) ** 2
        first = tokens - patches
        keep = max(1, math.ceil(patches * (1 - share)))
        drawn_BP = torch.rand(batch, patches, device=tokens_BTW.device)
        place_BK = first + drawn_BP.topk(keep, dim=1).indices.sort(dim=1).values
        patches_BKW = tokens_BTW.gather(1, place_BK[..., None].expand(-1, -1, width))
        return torch.cat([tokens_BTW[:, :first], patches_BKW], dim=1)

    embeddings.register_forward_hook(kept)


def _patches(given: tuple, side: int) -> int | None:
    """How many patches the pixels (B, 3, H, W) that the embeddings were given are cut into."""
    if not given or not torch.is_tensor(given[0]) or given[0].ndim != 4:
        return None
    height, width = given[0].shape[2:]
    return (height // side) * (width // side)
