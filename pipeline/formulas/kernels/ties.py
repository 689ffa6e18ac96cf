"""What a positive among ties is worth, over random tie-breaking.

Of t candidates that score alike, p of them positive, with a others above them.

Legend of the shape suffixes: Q queries.
"""

import torch
from torch import Tensor


def chance_within(k: int, above_Q: Tensor, tied_Q: Tensor, hits_Q: Tensor) -> Tensor:
    """chance_Q that one of the p positives is among the first k places.

    With m places left, 1 - C(t - p, m) / C(t, m).
    """
    left_Q = (k - above_Q).clamp(min=0).minimum(tied_Q)
    misses_Q = tied_Q - hits_Q
    drawn_Q = left_Q.minimum(misses_Q)
    none_Q = torch.exp(_log_choose(misses_Q, drawn_Q) - _log_choose(tied_Q, drawn_Q))
    return torch.where(left_Q > misses_Q, 1.0, 1 - none_Q)


def expected_place(above_Q: Tensor, tied_Q: Tensor, hits_Q: Tensor) -> Tensor:
    """place_Q, from 1, of the first of the p positives: 1 + a + (t - p) / (p + 1)."""
    return 1 + above_Q + (tied_Q - hits_Q) / (hits_Q + 1)


def _log_choose(n_Q: Tensor, m_Q: Tensor) -> Tensor:
    return torch.lgamma(n_Q + 1) - torch.lgamma(m_Q + 1) - torch.lgamma(n_Q - m_Q + 1)
