"""Text tower: word vectors and a GRU, as in VSE++ and VSE∞."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.models.pooling import POOLINGS
from pipeline.models.two_tower import TowerInputs
from schemas.settings import ModelSettings


class GRUTower(nn.Module):
    """A GRU over the words, forth, or forth and back: (B, L) ids, (B,) lengths -> (B, dim).

    pooling "last" is the state after the last word; others pool the states of all words. Of two
    directions the mean is taken.
    """

    def __init__(
        self,
        words: int,
        word_dim: int,
        dim: int,
        *,
        bidirectional: bool = False,
        pooling: str = "last",
    ):
        super().__init__()
        self.embed = nn.Embedding(words, word_dim, padding_idx=0)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.gru = nn.GRU(word_dim, dim, batch_first=True, bidirectional=bidirectional)
        self.pool = None if pooling == "last" else POOLINGS[pooling]()

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "GRUTower":
        both, pooling = settings.text == "bigru", settings.text_pooling
        sizes = given.words, settings.word_dim, settings.dim
        return cls(*sizes, bidirectional=both, pooling=pooling)

    def forward(self, words_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        vectors_BLD, lengths = self.embed(words_BL), lengths_B.cpu()
        packed = pack_padded_sequence(vectors_BLD, lengths, batch_first=True, enforce_sorted=False)
        states, last = self.gru(packed)
        if self.pool is None:
            return last.mean(0) if self.gru.bidirectional else last[-1]
        longest = words_BL.shape[1]
        states_BLD, _ = pad_packed_sequence(states, batch_first=True, total_length=longest)
        if self.gru.bidirectional:
            states_BLD = torch.stack(states_BLD.chunk(2, -1)).mean(0)
        place_L = torch.arange(longest, device=words_BL.device)
        return self.pool(
            states_BLD, place_L < lengths_B.to(words_BL.device, non_blocking=True)[:, None]
        )
