"""Towers as graphs can hold them: no packed sequences, no shapes that depend on values.

A packed sequence becomes a padded one with a mask, and GPO's weights, which depend on a length
alone, a table. The vectors are those of the towers to rounding.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from pipeline.models import TwoTower
from pipeline.models.gru import GRUTower
from pipeline.models.pooling import GPO
from pipeline.models.regions import RegionTower

LONGEST = 512  # places that GPO's table has: regions of an image, or words of a caption
States = Callable[..., torch.Tensor]


class ImageGraph(nn.Module):
    """(B, 3, H, W) uint8, or (B, R, F) float32 features -> unit vectors (B, dim)."""

    def __init__(self, towers: TwoTower):
        super().__init__()
        self.tower = plain(towers.image)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(images).float(), dim=1)


class TextGraph(nn.Module):
    """Padded ids (B, L) and lengths (B,), both int64 -> unit vectors (B, dim)."""

    def __init__(self, towers: TwoTower, states: States | None = None):
        super().__init__()
        self.tower = plain(towers.text, states)

    def forward(self, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(words, lengths).float(), dim=1)


def plain(tower: nn.Module, states: States | None = None) -> nn.Module:
    """The tower's copy of which a graph can be made; `states` runs a GRU one way (see `forth`)."""
    tower = copy.deepcopy(tower)
    if isinstance(tower, GRUTower | RegionTower) and isinstance(tower.pool, GPO):
        tower.pool = TabledGPO(tower.pool)
    return PaddedGRUTower(tower, states or forth) if isinstance(tower, GRUTower) else tower


def forth(
    x_BLD: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor,
    b_hh: torch.Tensor,
) -> torch.Tensor:
    """The states (B, L, H) of a GRU that runs over padded sequences from their first place."""
    start_1BH = x_BLD.new_zeros(1, x_BLD.shape[0], w_hh.shape[1])
    weights = [w_ih, w_hh, b_ih, b_hh]
    return torch.gru(x_BLD, start_1BH, weights, True, 1, 0.0, False, False, True)[0]


class PaddedGRUTower(nn.Module):
    """A GRU tower whose sequences are padded: backwards each is turned round by itself."""

    def __init__(self, tower: GRUTower, states: States):
        super().__init__()
        self.embed, self.gru, self.pool = tower.embed, tower.gru, tower.pool
        self.states = states

    def forward(self, words_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        x_BLD = self.embed(words_BL)
        place_L = torch.arange(words_BL.shape[1], device=words_BL.device)
        turned_BL = (lengths_B[:, None] - 1 - place_L).clamp(min=0)
        last_B11 = (lengths_B - 1)[:, None, None]
        ways = [self.states(x_BLD, *self._weights(""))]
        ends = [ways[0].gather(1, last_B11.expand(-1, -1, ways[0].shape[2]))[:, 0]]
        if self.gru.bidirectional:
            back_BLH = self.states(_placed(x_BLD, turned_BL), *self._weights("_reverse"))
            ways.append(_placed(back_BLH, turned_BL))
            ends.append(ways[1][:, 0])
        if self.pool is None:
            return torch.stack(ends).mean(0)
        return self.pool(torch.stack(ways).mean(0), place_L < lengths_B[:, None])

    def _weights(self, way: str) -> list[torch.Tensor]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return [getattr(self.gru, name + way) for name in names]


def _placed(x_BLD: torch.Tensor, place_BL: torch.Tensor) -> torch.Tensor:
    """What lies at those places."""
    return x_BLD.gather(1, place_BL[..., None].expand(-1, -1, x_BLD.shape[2]))


class TabledGPO(nn.Module):
    """GPO with its weights looked up by the number of vectors, of which there are at most LONGEST.

    More of them are an index that is out of range, and an error.
    """

    table: torch.Tensor

    def __init__(self, pool: GPO):
        super().__init__()
        with torch.no_grad():
            place = next(pool.parameters()).device
            weights = pool.weights(torch.arange(1, LONGEST + 1, device=place), LONGEST)
        self.register_buffer("table", nn.functional.pad(weights, (0, 0, 1, 0)))

    def forward(self, x_BND: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
        place_N = torch.arange(x_BND.shape[1], device=x_BND.device)
        weights_BN = self.table[mask_BN.sum(1)].index_select(1, place_N)
        x_BND = x_BND.masked_fill(~mask_BN[..., None], -torch.inf)
        sorted_BND = x_BND.sort(1, descending=True).values
        sorted_BND = torch.where(sorted_BND == -torch.inf, 0.0, sorted_BND)
        return (weights_BN[..., None] * sorted_BND).sum(1)
