"""What a pair costs in the towers: counted on the towers themselves, or by a formula."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline import models
from pipeline.errors import InputError
from schemas.settings import ModelSettings

PAIRS = 4  # encoded to count; every pair costs the same
REGIONS = 36  # of an image, in the public feature files


class Towers(NamedTuple):
    """Of both towers together."""

    parameters: int
    flops: float  # of a pair's forward pass
    activations: float  # bytes of a pair that the backward pass needs, in fp32
    counted: bool  # on the towers themselves; else by the formula of transformers


class Transformer(NamedTuple):
    """The shape of one side of a pretrained model."""

    parameters: int
    layers: int
    width: int
    tokens: int


B_TEXT, L_TEXT = Transformer(63_428_096, 12, 512, 77), Transformer(123_650_304, 12, 768, 77)
KNOWN = {  # by the last part of the name: image and text side
    "clip-vit-base-patch32": (Transformer(87_849_216, 12, 768, 50), B_TEXT),
    "clip-vit-base-patch16": (Transformer(86_192_640, 12, 768, 197), B_TEXT),
    "clip-vit-large-patch14": (Transformer(303_966_208, 24, 1024, 257), L_TEXT),
}


def towers(settings: ModelSettings, *, words: int, tokens: int) -> Towers:
    """Cost of the settings' towers: a vocabulary of `words`, captions of `tokens`."""
    if "pretrained" in (settings.image, settings.text):
        return _by_formula(settings)
    features = 2048 if settings.image == "regions" else None
    model = models.build(settings, vocabulary=range(words), features=features)  # type: ignore[arg-type]
    size = settings.image_size
    images = torch.zeros(PAIRS, 3, size, size, dtype=torch.uint8)
    if features:
        images = torch.rand(PAIRS, REGIONS, features)
    captions = torch.ones(PAIRS, tokens, dtype=torch.long)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        vectors = model(images, captions, torch.full((PAIRS,), tokens))
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in weights)
    del vectors
    return Towers(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=counter.get_total_flops() / PAIRS,
        activations=activations / PAIRS,
        counted=True,
    )


def _by_formula(settings: ModelSettings) -> Towers:
    """24 w² FLOPs a layer and token and 4 w tokens of attention, 34 w bytes of activations.

    (Korthikanti et al., arXiv 2205.05198; with gradient checkpointing a layer's input alone.)
    """
    name = (settings.pretrained or "").rstrip("/").rsplit("/", 1)[-1]
    if name not in KNOWN:
        raise InputError(
            f"the size of model.pretrained {settings.pretrained!r} is not known here; plan with "
            f"one of {', '.join(KNOWN)}, which is near to it"
        )
    sides = KNOWN[name]
    kept = 2 if settings.gradient_checkpointing else 34
    return Towers(
        parameters=sum(side.parameters for side in sides),
        flops=sum(s.layers * s.tokens * s.width * (24.0 * s.width + 4 * s.tokens) for s in sides),
        activations=sum(float(kept * s.layers * s.tokens * s.width) for s in sides),
        counted=False,
    )
