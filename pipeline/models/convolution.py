"""A small convolutional image tower that trains from scratch."""

import torch
from torch import nn

from schemas.settings import ModelSettings

STAGES = 4  # each halves the side and the last two keep their width: small pictures, small tower
GRID = 4  # the side of the map that is kept: captions say left and right, so places must survive


class ConvolutionTower(nn.Module):
    """Strided residual stages and a linear map of a 4 × 4 grid: (B, 3, S, S) uint8 -> (B, dim)."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 4)]
        self.stages = nn.Sequential(
            *[Stage(c_in, c_out) for c_in, c_out in zip([3, *widths], widths, strict=False)]
        )
        self.pool = nn.AdaptiveAvgPool2d(GRID)
        self.project = nn.Linear(widths[-1] * GRID * GRID, dim)

    @classmethod
    def from_settings(cls, settings: ModelSettings, features: int | None) -> "ConvolutionTower":
        if features is not None:
            raise ValueError(
                "model.image 'pixels' needs image shards, these hold features; use 'regions'"
            )
        return cls(settings.width, settings.dim)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = images_BCHW.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        return self.project(self.pool(self.stages(x)).flatten(1))


class Stage(nn.Module):
    """Halve the side, then one residual convolution.

    Group norm, not batch norm: a sample's vector must not depend on who shares its worker.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.down = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.GroupNorm(8, c_out)
        self.mix = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.mix_norm = nn.GroupNorm(8, c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down_norm(self.down(x)))
        return torch.relu(x + self.mix_norm(self.mix(x)))
