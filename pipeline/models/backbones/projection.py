"""From an encoder's vector into the space of both towers."""

import torch
from torch import nn

from schemas.settings import ModelSettings


class ResidualProjection(nn.Module):
    """(B, F) -> (B, dim): a linear map, and beside it one hidden layer of twice the width.

    The vector is normalised first, so that encoders of any scale are alike, and some of it is
    dropped in training: a frozen encoder shows the same vector in every epoch.
    """

    def __init__(self, features: int, dim: int, dropout: float):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(features), nn.Dropout(dropout)
        self.straight = nn.Linear(features, dim)
        self.widen, self.narrow = nn.Linear(features, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        x_BF = self.drop(self.norm(x_BF))
        hidden = self.drop(nn.functional.gelu(self.widen(x_BF)))
        return self.straight(x_BF) + self.narrow(hidden)


def projection(features: int, settings: ModelSettings) -> nn.Module:
    """A new projection of vectors `features` wide, as `model.projection` says."""
    if settings.projection == "linear":
        return nn.Linear(features, settings.dim)
    return ResidualProjection(features, settings.dim, settings.dropout)
