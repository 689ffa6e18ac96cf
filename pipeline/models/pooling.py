"""Many vectors into one: maximum, mean, or GPO."""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

POSITION_DIM = 32  # of the code of a place in the order
TEMPERATURE = 0.1  # of GPO's weights


class Max(nn.Module):
    """The largest value of each dimension."""

    def forward(self, x_BND: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
        return x_BND.masked_fill(~mask_BN[..., None], -torch.inf).amax(1)


class Mean(nn.Module):
    """The mean of each dimension."""

    def forward(self, x_BND: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
        total = (x_BND * mask_BN[..., None]).sum(1)
        return total / mask_BN.sum(1, keepdim=True)


class GPO(nn.Module):
    """Generalised pooling operator of VSE∞ (arXiv 2011.04305).

    Each dimension's values are sorted, the largest first, and weighted by their place; the weights
    are learned as a function of the places' codes, so that they fit any number of vectors.
    """

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(POSITION_DIM, POSITION_DIM, batch_first=True, bidirectional=True)
        self.score = nn.Linear(POSITION_DIM, 1, bias=False)

    def forward(self, x_BND: torch.Tensor, mask_BN: torch.Tensor) -> torch.Tensor:
        weights_BN = self.weights(mask_BN.sum(1), x_BND.shape[1])
        x_BND = x_BND.masked_fill(~mask_BN[..., None], -torch.inf)
        sorted_BND = x_BND.sort(1, descending=True).values
        # A place that is not there weighs 0, and 0 × -inf would not be 0.
        sorted_BND = sorted_BND.masked_fill(sorted_BND == -torch.inf, 0)
        return torch.einsum("bn,bnd->bd", weights_BN, sorted_BND)

    def weights(self, lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
        """(B, N) weights of the places, those from the length on 0."""
        unique, row_B = lengths_B.unique(return_inverse=True)
        # Sines and cosines of the places 0 … longest - 1.
        place = torch.arange(longest, device=unique.device, dtype=torch.float32)[:, None]
        step = torch.arange(0, POSITION_DIM, 2, device=unique.device, dtype=torch.float32)
        angle = place * torch.exp(step * (-math.log(10_000.0) / POSITION_DIM))
        codes = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        codes = codes.expand(len(unique), -1, -1)
        packed = pack_padded_sequence(codes, unique.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        both = (states[..., :POSITION_DIM] + states[..., POSITION_DIM:]) / 2
        scores = self.score(both).squeeze(-1) / TEMPERATURE
        there = torch.arange(longest, device=scores.device) < unique[:, None]
        return scores.masked_fill(~there, -torch.inf).softmax(1)[row_B]


POOLINGS = {"max": Max, "mean": Mean, "gpo": GPO}
