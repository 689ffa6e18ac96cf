"""Cross-encoders: two texts read together give one score."""

import functools
from contextlib import nullcontext

import numpy as np

from pipeline.errors import InputError
from pipeline.labels.encoders import sentences
from schemas.settings import EmbedSettings

PAIRS = {"cpu": 32, "cuda": 1024}  # per forward pass


def rescore(
    pairs: list[tuple[str, str]], cross_encoder: str, settings: EmbedSettings
) -> np.ndarray:
    """Scores (P,) float32 in [0, 1] of P pairs of texts, by the cross-encoder of a name or folder.

    A pair that occurs twice is scored once. Device and precision are the encoder's (`auto` is fp32
    here); `sentences.fingerprint` stands for the weights.
    """
    import torch

    kind = sentences.device(settings)
    model = _load(cross_encoder, kind)
    unique = list(dict.fromkeys(pairs))
    bf16 = settings.precision == "bf16"
    with torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext():
        how = {"batch_size": PAIRS[kind], "activation_fn": torch.nn.Sigmoid()}
        scores = model.predict(unique, show_progress_bar=False, **how)
    if not np.isfinite(scores).all():
        raise InputError(f"cross-encoder {cross_encoder} gave scores that are not finite numbers")
    position = {pair: row for row, pair in enumerate(unique)}
    return scores[np.array([position[pair] for pair in pairs], int)].astype(np.float32)


@functools.lru_cache(maxsize=1)
def _load(cross_encoder: str, device: str):
    """The sentence-transformers cross-encoder, loaded once per process."""
    from sentence_transformers import CrossEncoder

    folder = sentences.path(cross_encoder)
    try:
        model = CrossEncoder(str(folder or cross_encoder), device=device)
    except Exception as error:  # hub, cache and format errors have no common base
        raise sentences.not_there("cross-encoder", cross_encoder, error) from error
    if model.num_labels != 1:
        raise InputError(
            f"cross-encoder {cross_encoder} gives {model.num_labels} scores a pair; choose one "
            "that gives a single similarity"
        )
    return model
