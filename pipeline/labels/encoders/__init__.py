"""Encoders: captions become unit vectors whose dot products say how alike the captions are.

`embed.encoder` names one: `tfidf`, `trigrams` and `lsa` are fitted on the train captions
(fitted.py), an `ensemble` joins several, any other is a sentence-transformers model (sentences.py).
"""

import re
from collections.abc import Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.labels.encoders.cross import rescore
from schemas.settings import EmbedSettings

__all__ = ["encoder_label", "join", "members", "rescore"]


def encoder_label(encoder: str) -> str:
    """A folder name for an encoder's name or path."""
    return re.sub(r"[^\w.-]", "_", encoder.rstrip("/").rsplit("/", 1)[-1])


def members(settings: EmbedSettings) -> list[tuple[EmbedSettings, float]]:
    """The members of an ensemble, each as settings of its own, with weights that sum to 1."""
    total = sum(settings.members.values())
    if len({encoder_label(encoder) for encoder in settings.members}) < len(settings.members):
        raise InputError(
            f"two members of {settings.encoder} would share a folder ({', '.join(settings.members)}"
            "); rename the folder of one of them"
        )
    return [
        (settings.model_copy(update={"encoder": encoder, "members": {}}), weight / total)
        for encoder, weight in settings.members.items()
    ]


def join(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Unit vectors (N, ΣD) whose dot products are the weighted means of the parts' cosines.

    √w times a unit vector each, side by side: their dot product is Σ w·cos, exactly.
    """
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in vectors]
    scaled = [np.float32(np.sqrt(w)) * unit for unit, w in zip(units, weights, strict=True)]
    return np.hstack(scaled)
