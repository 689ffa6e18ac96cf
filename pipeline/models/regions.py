"""Image tower on precomputed region features, as in VSE++ and VSE∞."""

import torch
from torch import nn

from pipeline.models.pooling import POOLINGS
from pipeline.models.two_tower import TowerInputs
from schemas.settings import ModelSettings


class RegionTower(nn.Module):
    """One linear map per region, then a pooling over regions: (B, R, features) -> (B, dim).

    A region of zeros alone is not there (arrays are padded with such ones).
    """

    def __init__(self, features: int, dim: int, pooling: str = "max"):
        super().__init__()
        self.project = nn.Linear(features, dim)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.pool = POOLINGS[pooling]()

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "RegionTower":
        if given.features is None:
            raise ValueError(
                "model.image 'regions' needs feature shards, these hold images; use 'pixels'"
            )
        return cls(given.features, settings.dim, settings.image_pooling)

    def forward(self, regions_BRF: torch.Tensor) -> torch.Tensor:
        if regions_BRF.ndim == 2:  # one vector an image
            regions_BRF = regions_BRF[:, None]
        regions_BRF = regions_BRF.float()
        there_BR = regions_BRF.any(-1)
        there_BR[:, 0] = True
        return self.pool(self.project(regions_BRF), there_BR)
