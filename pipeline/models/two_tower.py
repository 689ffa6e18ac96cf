"""Two towers into one space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn.functional import normalize

from pipeline.models.tuning.modes import FrozenPart, Tuned


class TwoTower(nn.Module):
    """An image tower and a text tower; score = cosine of their outputs.

    `tuned` says by side what of a tower is trained. `learned` are numbers of the losses that are
    learned with the towers, by name; they are part of the model and of its checkpoints.
    """

    def __init__(self, image: nn.Module, text: nn.Module, tuned: Mapping[str, Tuned] | None = None):
        super().__init__()
        self.image, self.text = image, text
        self.learned = nn.ParameterDict()
        self.came_with: dict[str, float] = {}  # `logit_scale`, `logit_bias` of a pretrained model
        self.tuned = dict(tuned or {})
        self.given: dict[str, FrozenPart] = {}  # by side: in training, inputs are what it made

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, dim) float32 of B images or feature arrays, or of what is `given`."""
        given = self.given.get("image")
        return normalize((given.head(images) if given else self.image(images)).float(), dim=1)

    def encode_text(self, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, dim) float32 of B captions: padded word ids (B, L), lengths (B,)."""
        return normalize(self.text(words, lengths).float(), dim=1)

    def forward(self, images, words, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encodings of B pairs; the one call that DistributedDataParallel sees.

        Of a side that is `given`, the input is what its frozen part made: images, or words, are
        (B, F) then.
        """
        if text := self.given.get("text"):
            return self.encode_image(images), normalize(text.head(words).float(), dim=1)
        return self.encode_image(images), self.encode_text(words, lengths)

    def train(self, mode: bool = True) -> Self:
        """As every module's; what is frozen stays as it is evaluated."""
        super().train(mode)
        for tuned in self.tuned.values():
            for module in tuned.still:
                module.training = False
        return self

    def lr_scale(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied with; a tower may have its say."""
        tower, _, inner = name.partition(".")
        own = getattr(getattr(self, tower), "lr_scale", None)
        scale = self.tuned[tower].lr_scale(inner) if tower in self.tuned else 1.0
        return own(inner) * scale if own else scale

    def lr_of(self, name: str) -> float | None:
        """The learning rate that the parameter's tower has for itself, if it has one."""
        tuned = self.tuned.get(name.partition(".")[0])
        return tuned.lr if tuned else None


@dataclass(frozen=True)
class TowerInputs:
    """What the data and the pretrained model, if there is one, say of a tower's two ends."""

    features: int | None  # width of a region vector; None where the shards hold images
    words: int  # size of the vocabulary
    model: nn.Module | None = None  # the Hugging Face model of the pretrained towers
