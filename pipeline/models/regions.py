"""Image tower on precomputed region features, as in VSE++ on regions."""

import torch
from torch import nn

from schemas.settings import ModelSettings


class RegionTower(nn.Module):
    """One linear map per region, then the maximum over regions: (B, R, features) -> (B, dim)."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.project = nn.Linear(features, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    @classmethod
    def from_settings(cls, settings: ModelSettings, features: int | None) -> "RegionTower":
        if features is None:
            raise ValueError(
                "model.image 'regions' needs feature shards, these hold images; use 'pixels'"
            )
        return cls(features, settings.dim)

    def forward(self, regions_BRF: torch.Tensor) -> torch.Tensor:
        return self.project(regions_BRF.float()).amax(dim=1)
