"""What a tower is told beside its settings."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Given:
    """What the data and the pretrained model, if there is one, say of a tower's two ends."""

    features: int | None  # width of a region vector; None where the shards hold images
    words: int  # size of the vocabulary
    model: nn.Module | None = None  # the Hugging Face model of the pretrained towers
