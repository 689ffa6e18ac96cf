"""Two towers into one space."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize

from pipeline.models.preprocessing import Preprocessing


class TwoTower(nn.Module):
    """An image tower and a text tower; score = cosine of their outputs."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, dim) float32 of B images or feature arrays."""
        return normalize(self.image(images).float(), dim=1)

    def encode_text(self, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, dim) float32 of B captions: padded word ids (B, L), lengths (B,)."""
        return normalize(self.text(words, lengths).float(), dim=1)

    def forward(self, images, words, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encodings of B pairs; the one call that DistributedDataParallel sees."""
        return self.encode_image(images), self.encode_text(words, lengths)

    def lr_scale(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied with; a tower may have its say."""
        tower, _, inner = name.partition(".")
        scale = getattr(getattr(self, tower), "lr_scale", None)
        return scale(inner) if scale else 1.0


@dataclass(frozen=True)
class TowerInputs:
    """What the data and the pretrained model, if there is one, say of a tower's two ends."""

    features: int | None  # width of a region vector; None where the shards hold images
    words: int  # size of the vocabulary
    model: nn.Module | None = None  # the Hugging Face model of the pretrained towers
    preprocessing: Preprocessing | None = None  # of the pictures that the image tower gets


def blocks_of(tower: nn.Module) -> tuple[str, list[nn.Module]]:
    """A tower's blocks in order, with the name of their list: its longest list of modules.

    ("", []) where it has none. Lists of single layers are none.
    """
    lists = [
        (name, list(module))
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(m.children()) for m in module)
    ]
    return max(lists, key=lambda found: len(found[1]), default=("", []))
