"""Towers with the weights of a Hugging Face model: CLIP and SigLIP classes, vision or text models.

Loaded by name or folder for training; a trained model is rebuilt from its configuration, which is
kept beside its weights, and asks for nothing else.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.models.backbones import packaged
from pipeline.models.backbones.projection import projection
from pipeline.models.positions import fitted
from pipeline.models.preprocessing import Preprocessing, of_pretrained
from pipeline.models.two_tower import TowerInputs
from pipeline.models.vocabulary import PretrainedPythonTokens, PretrainedTokens, not_installed
from schemas.settings import ModelSettings

LOG = logging.getLogger(__name__)
PADDED = ("siglip", "siglip2")  # text models that were trained on captions padded to full length
# Text models whose first places are never used: places are numbered from the padding's id on.
LATER = ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text")
# Classes that `AutoModel` would take for others, and fill up with random weights.
CLASSES = ("BlipForImageTextRetrieval",)
FIRST = {"vision_proj", "text_proj"}  # projections of the first state, not of the pooled one


class PretrainedTower(nn.Module):
    """What both sides share: an encoder with weights, and the projection into the space.

    In two parts (`features` and `head`), so that frozen the first one's vectors can be kept.
    """

    def __init__(
        self, encoder: nn.Module, project: nn.Module, settings: ModelSettings, *, own: bool
    ):
        super().__init__()
        self.encoder, self.project = encoder, project
        self.new = () if own else ("project",)
        if settings.gradient_checkpointing:
            # Block by block. The re-entrant kind would send nothing to what lies behind frozen
            # layers. (Another name since a later transformers 5.)
            old = "gradient_checkpointing_enable"
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or getattr(encoder, old))({"use_reentrant": False})

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, dim) of what `features` gave."""
        return self.project(features)


class PretrainedImageTower(PretrainedTower):
    """(B, 3, S, S) uint8 -> (B, dim), S as in the model's configuration."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, settings: ModelSettings, preprocessing: Preprocessing | None = None
    ):
        encoder, project, own = _side(model, SIDES["image"], settings)
        super().__init__(encoder, project, settings, own=own)
        self.first = _takes_first(model, SIDES["image"])
        if getattr(encoder.config, "image_size", None) is None:
            raise ValueError(f"model.pretrained {settings.pretrained!r} takes no images")
        # A trained model has the statistics among its weights; one of before has no other steps.
        how = preprocessing or Preprocessing.squash(encoder.config.image_size)
        self.rescale = how.rescale
        for name in ("mean", "std"):  # of a channel, of rescaled images
            values = torch.tensor(getattr(how, name))
            self.register_buffer(name, values[:, None, None])

    @classmethod
    def preprocessing(cls, settings: ModelSettings) -> Preprocessing:
        """The model's own, of `model.image_size` if that is given."""
        vision = _part(_from_pretrained("AutoConfig", settings), "vision_config")
        side = getattr(vision, "image_size", None)
        if side is None:
            raise ValueError(f"model.pretrained {settings.pretrained!r} takes no images")
        kind = vision.model_type.removesuffix("_vision_model")
        side = max(side) if isinstance(side, list | tuple) else side
        how = of_pretrained(settings.pretrained, kind, side)
        return how if settings.image_size is None else how.at(*(settings.image_size,) * 2)

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "PretrainedImageTower":
        if given.features is not None:
            raise ValueError("a pretrained image tower needs image shards, these hold features")
        return cls(given.model, settings, given.preprocessing)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images_BCHW))

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F): the encoder's pooled state, or its first one."""
        pixels = (images_BCHW.float() * self.rescale - self.mean) / self.std
        out = self.encoder(pixel_values=pixels)
        if self.first:
            return out.last_hidden_state[:, 0]
        return out.pooler_output if out.pooler_output is not None else out[0].mean(1)


class PretrainedTextTower(PretrainedTower):
    """(B, L) token ids, (B,) lengths -> (B, dim)."""

    def __init__(self, model: nn.Module, settings: ModelSettings):
        encoder, project, own = _side(model, SIDES["text"], settings)
        super().__init__(encoder, project, settings, own=own)
        self.first = _takes_first(model, SIDES["text"])
        self.two_tower = encoder is not model

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "PretrainedTextTower":
        return cls(given.model, settings)

    def forward(self, words_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(words_BL, lengths_B))

    def features(self, words_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """(B, F): the encoder's pooled state, or the mean of its words' states."""
        place_L = torch.arange(words_BL.shape[1], device=words_BL.device)
        mask_BL = place_L < lengths_B.to(words_BL.device, non_blocking=True)[:, None]
        out = self.encoder(input_ids=words_BL, attention_mask=mask_BL.long())
        if self.first:
            return out.last_hidden_state[:, 0]
        if self.two_tower:  # its pooled state is what it was trained to match images with
            return out.pooler_output
        mask_BL1 = mask_BL[..., None].to(out.last_hidden_state.dtype)
        return (out.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)


def load(settings: ModelSettings, architecture: dict | None) -> nn.Module:
    """The Hugging Face model with its weights, or of a configuration, still untrained.

    For images or captions of another size than its own, its tables of positions are interpolated.
    """
    if architecture is not None:
        return _of(architecture)
    model, found = _from_pretrained("AutoModel", settings, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if lost := [name for name in missing if "pooler" not in name]:
        kind = (model.config.architectures or ["?"])[0]
        raise ValueError(
            f"model.pretrained {settings.pretrained!r} ({kind}) has no weights for {len(lost)} "
            f"tensors of {type(model).__name__}, such as {lost[0]}; take a model saved from that "
            "class"
        )
    if missing:
        LOG.warning("%s start at random: the checkpoint has none", ", ".join(missing))
    whole = _asked(settings)
    if told := _changes(model.config, whole):
        LOG.warning("%s: tables of positions are interpolated", " and ".join(told))
        model = fitted(model, _of(json.loads(whole.to_json_string(use_diff=False))), model.config)
    return model


def scale_and_bias(model: nn.Module | None) -> dict[str, float]:
    """A two-tower's learned `logit_scale` (a logarithm) and `logit_bias`, where it has them."""
    found = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
    return {name: float(x.detach()) for name, x in found.items() if torch.is_tensor(x)}


def architecture(settings: ModelSettings) -> dict:
    """The configuration that `load` rebuilds the model from."""
    return json.loads(_asked(settings).to_json_string(use_diff=False))


def _of(architecture: dict) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(**architecture)
    kind = getattr(transformers, _class(config))
    build = kind.from_config if kind is transformers.AutoModel else kind._from_config
    return build(config, dtype=torch.float32)


def _class(config) -> str:
    return next((name for name in config.architectures or () if name in CLASSES), "AutoModel")


def _from_pretrained(kind: str, settings: ModelSettings, **how):
    """What a class of transformers makes of the model; of the weights those of its own class."""
    import transformers

    if settings.pretrained is None:
        raise ValueError("model.pretrained is not given; give a model folder or a hub's name")
    if kind == "AutoModel":
        kind, how = (
            _class(_from_pretrained("AutoConfig", settings)),
            {**how, "dtype": torch.float32},
        )
    try:
        return getattr(transformers, kind).from_pretrained(_place(settings.pretrained), **how)
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ImportError) or "sentencepiece" in str(error):
            what = f"model.pretrained {settings.pretrained!r}"
            raise ValueError(not_installed(what, error)) from error
        raise ValueError(
            f"no pretrained model {settings.pretrained!r}: {str(error).splitlines()[0]} "
            "(model.pretrained takes a model folder, or a name that the model hub knows)"
        ) from error


def _place(name: str) -> str:
    """The model's folder on this disk where it came as a Python package, else what was given."""
    known = None if Path(name).is_dir() else packaged.known(name)
    return str(packaged.checked(known).parent) if known and packaged.file_of(known) else name


def _part(config, name: str):
    """The configuration of one side of a two-tower; of another model its own."""
    return getattr(config, name, config)


def _asked(settings: ModelSettings):
    """The model's configuration with the side of images and the places that are asked for."""
    config = _from_pretrained("AutoConfig", settings)
    if settings.image == "pretrained":
        vision = _part(config, "vision_config")
        shape = PretrainedImageTower.preprocessing(settings).shape
        own = vision.image_size
        if shape != (tuple(own) if isinstance(own, list | tuple) else (own, own)):
            patch = getattr(vision, "patch_size", 1)
            if shape[0] != shape[1] or shape[0] % patch:
                raise ValueError(
                    f"the image model cannot take {shape[0]} × {shape[1]} pixels: its positions "
                    f"fit squares of a multiple of {patch}, such as --model.image_size "
                    f"{max(1, round(min(shape) / patch)) * patch}"
                )
            vision.image_size = shape[0]
    if settings.text == "pretrained" and (settings.max_words or 0) > _places(config):
        text = _part(config, "text_config")
        text.max_position_embeddings = settings.max_words + _unused(text)
    return config


def _changes(own, asked) -> list[str]:
    """What is asked for and not the model's own, in words."""
    told = []
    for part, name, what in (
        ("vision_config", "image_size", "images of {1} pixels in place of {0}"),
        ("text_config", "max_position_embeddings", "captions of {1} places in place of {0}"),
    ):
        both = [getattr(_part(config, part), name, None) for config in (own, asked)]
        if both[0] != both[1]:
            told.append(what.format(*both))
    return told


def _places(config) -> int:
    """How many tokens the text model has positions for."""
    text = _part(config, "text_config")
    places = getattr(text, "max_position_embeddings", None)
    if places is None:
        raise ValueError(f"a model of type {config.model_type} has no table of a text's positions")
    return places - _unused(text)


def _unused(text) -> int:
    return (text.pad_token_id or 0) + 1 if text.model_type in LATER else 0


def tokens(settings: ModelSettings) -> PretrainedTokens:
    """The tokenizer that belongs to the model."""
    config = _asked(settings)
    tokenizer = _from_pretrained("AutoTokenizer", settings)
    places = _places(config)
    asked = settings.max_words or min(places, tokenizer.model_max_length)
    padded = config.model_type in PADDED
    how: dict[str, Any] = {
        "pad": tokenizer.pad_token_id or 0,
        "length": places if padded else min(asked, places),
        "padded": padded,
    }
    if tokenizer.truncation_side == "left" or (padded and tokenizer.padding_side == "left"):
        raise ValueError(
            f"the tokenizer of {settings.pretrained!r} pads or cuts on the left; set padding_side "
            "and truncation_side in its tokenizer_config.json to right"
        )
    if tokenizer.is_fast:
        return PretrainedTokens(tokenizer.backend_tokenizer.to_str(), **how)
    return PretrainedPythonTokens(PretrainedPythonTokens.files_of(tokenizer), **how)


# Names of a side's encoder and of its projection, in the classes there are.
SIDES = {
    "image": (("vision_model",), ("visual_projection", "vision_proj")),
    "text": (("text_model", "text_encoder"), ("text_projection", "text_proj")),
}


def _side(model, names: tuple[tuple[str, ...], ...], settings: ModelSettings):
    """Encoder and projection of one side, and whether that is the model's own.

    A two-tower keeps its own space if both sides use it.
    """
    encoders, projections = ([n for n in of if hasattr(model, n)] for of in names)
    encoder = getattr(model, encoders[0]) if encoders else model
    if settings.image == settings.text == "pretrained" and encoder is not model:
        return encoder, getattr(model, (*projections, "")[0], nn.Identity()), True
    return encoder, projection(encoder.config.hidden_size, settings), False


def _takes_first(model, names: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the side's projection takes the first state."""
    return any(hasattr(model, name) for name in FIRST.intersection(names[1]))
