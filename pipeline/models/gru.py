"""Text tower: word vectors and a GRU, as in VSE++."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from schemas.settings import ModelSettings


class GRUTower(nn.Module):
    """The last state of a one-layer GRU over the words: (B, L) ids, (B,) lengths -> (B, dim)."""

    def __init__(self, words: int, word_dim: int, dim: int):
        super().__init__()
        self.embed = nn.Embedding(words, word_dim, padding_idx=0)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.gru = nn.GRU(word_dim, dim, batch_first=True)

    @classmethod
    def from_settings(cls, settings: ModelSettings, words: int) -> "GRUTower":
        return cls(words, settings.word_dim, settings.dim)

    def forward(self, words_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(
            self.embed(words_BL), lengths_B.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][-1]
