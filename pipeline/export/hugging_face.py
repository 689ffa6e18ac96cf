"""A folder for transformers: `AutoModel`, `AutoTokenizer` and `AutoImageProcessor` load it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.export.writing import (
    BOTH,
    Loaded,
    Pictures,
    Sides,
    batched,
    write_preprocessor,
    write_words,
)
from pipeline.models import TwoTower, pretrained
from pipeline.models.tuning import merged
from pipeline.training.saved_model import SavedModel

# What a tower by itself is loaded by, by the type of the whole.
ALONE = {
    "clip": {"image": "CLIPVisionModelWithProjection", "text": "CLIPTextModelWithProjection"},
    "siglip": {"image": "SiglipVisionModel", "text": "SiglipTextModel"},
    "siglip2": {"image": "Siglip2VisionModel", "text": "Siglip2TextModel"},
}
INSTEAD = "--to onnx and --to torch take any tower"


class HuggingFace:
    """The two-tower it was tuned from, with its tuned weights; or one tower of that."""

    needs: tuple[str, ...] = ("transformers",)

    def refusal(self, model: SavedModel, sides: Sides) -> str | None:
        return not_of_one_model(model, sides) or _not_alone(model, sides)

    def write(self, model: SavedModel, folder: Path, sides: Sides) -> None:
        exported: Any = whole(model)
        if sides != BOTH:
            exported = _alone(exported, sides[0])
        exported.save_pretrained(folder)
        if "image" in sides:
            write_preprocessor(model, folder)
        if "text" in sides:
            write_words(model, folder)

    def read(self, folder: Path, model: SavedModel, sides: Sides) -> Loaded:
        import transformers

        if sides == BOTH:
            loaded = transformers.AutoModel.from_pretrained(folder).eval()
            image, text = loaded.get_image_features, loaded.get_text_features
        else:
            kind = ALONE[_type(model)][sides[0]]
            image = text = getattr(transformers, kind).from_pretrained(folder).eval()

        def texts(some: Sequence[str]) -> torch.Tensor:
            return _vectors(text(**tokens(list(some))))

        def images(some: Pictures) -> torch.Tensor:
            return _vectors(image(**pixels(list(some), return_tensors="pt")))

        if "text" in sides:
            tokens = _tokenizer(folder, model)
        if "image" in sides:
            # The one that works on pictures as Pillow does, as the model was trained.
            load: Any = transformers.AutoImageProcessor.from_pretrained
            pixels = load(folder, backend="pil")
        return Loaded(
            (lambda some: batched(texts, some)) if "text" in sides else None,
            (lambda some: batched(images, some)) if "image" in sides else None,
        )


def not_of_one_model(model: SavedModel, sides: Sides) -> str | None:
    """Why the towers are not those of one model of transformers; None where they are."""
    settings = model.recipe.model
    for side in BOTH:
        if (kind := getattr(settings, side)) != "pretrained" and side in sides:
            return f"transformers has no class for the {side} tower {kind!r}; {INSTEAD}"
    if not settings.image == settings.text == "pretrained":
        return (
            "the tower is one side of a model whose other side is not, and its projection is new, "
            f"so no class of transformers holds it; {INSTEAD}"
        )
    if any(getattr(tower, "first", False) for tower in (model.towers.image, model.towers.text)):
        return f"AutoModel has no class for a {_type(model)} that projects first states; {INSTEAD}"
    if not hasattr(_encoder(model.towers.image), "config") or model.architecture is None:
        return f"how the towers are built was not kept; {INSTEAD}"
    if not {"vision_config", "text_config"} <= model.architecture.keys():
        return (
            f"a model of type {_type(model)} has one tower, and its projections are new, so no "
            f"class of transformers holds both; {INSTEAD}"
        )
    return None


def whole(model: SavedModel) -> nn.Module:
    """The two-tower model of transformers that the towers are of, with their weights."""
    towers: Any = merged(model.towers).cpu()
    exported: Any = pretrained.load(model.recipe.model, model.architecture)
    exported.vision_model, exported.text_model = towers.image.encoder, towers.text.encoder
    for side, name in (("image", "visual_projection"), ("text", "text_projection")):
        if hasattr(exported, name):
            setattr(exported, name, getattr(towers, side).project)
    for name, value in scale_and_bias(towers).items():
        if torch.is_tensor(getattr(exported, name, None)):
            getattr(exported, name).data.fill_(value)
    return exported.eval().requires_grad_(True)


def scale_and_bias(towers: TwoTower) -> dict[str, float]:
    """What the scores are multiplied with (`logit_scale`, a logarithm), and the `logit_bias`.

    As they were learned in training, else as the pretrained model came with them; empty where
    neither was kept.
    """
    found = dict(getattr(towers, "came_with", {}))
    for key, value in getattr(towers, "learned", {}).items():
        if key.endswith(("_temperature", "_scale")):
            found["logit_scale"] = float(value)
        elif key.endswith("_bias"):
            found["logit_bias"] = float(value)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _not_alone(model: SavedModel, sides: Sides) -> str | None:
    if sides == BOTH or _type(model) in ALONE:
        return None
    known = ", ".join(ALONE)
    return (
        f"transformers has no class for one tower of a {_type(model)} with its projection (known: "
        f"{known}); leave out --tower, or {INSTEAD}"
    )


def _alone(exported: Any, side: str) -> nn.Module:
    """One tower as the class that transformers has for it."""
    import transformers

    kind = getattr(transformers, ALONE[exported.config.model_type][side])
    inner, projection = {
        "image": ("vision_model", "visual_projection"),
        "text": ("text_model", "text_projection"),
    }[side]
    config = getattr(exported.config, "vision_config" if side == "image" else "text_config")
    if hasattr(exported, projection):
        config.projection_dim = exported.config.projection_dim
    alone = kind(config)
    alone.load_state_dict(
        {
            name: value
            for name, value in exported.state_dict().items()
            if name.startswith((f"{inner}.", f"{projection}."))
        }
        if hasattr(alone, inner)
        else getattr(exported, inner).state_dict()
    )
    return alone.eval()


def _tokenizer(folder: Path, model: SavedModel):
    """The tokenizer of a folder, told how its texts are padded and cut."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    state: Any = model.vocabulary.state
    how = {"padding": "max_length" if state["padded"] else True, "max_length": state["length"]}

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        return tokenizer(texts, truncation=True, return_tensors="pt", **how)

    return tokens


def _vectors(out: Any) -> torch.Tensor:
    """The pooled vectors of what a model gave."""
    if torch.is_tensor(out):
        return out
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise TypeError(f"no vectors in {type(out).__name__}")


def _encoder(tower: nn.Module) -> Any:
    return getattr(tower, "encoder", tower)


def _type(model: SavedModel) -> str:
    return (model.architecture or {}).get("model_type", "unknown")
