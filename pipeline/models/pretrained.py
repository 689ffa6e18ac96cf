"""Towers with the weights of a Hugging Face model: CLIP and SigLIP classes, vision or text models.

Loaded by name or folder for training; a trained model is rebuilt from its configuration, which is
kept beside its weights, and asks for nothing else.
"""

import contextlib
import json
from pathlib import Path

import torch
from torch import nn

from pipeline.models.two_tower import TowerInputs
from pipeline.models.vocabulary import PretrainedPythonTokens, PretrainedTokens, not_installed
from schemas.settings import ModelSettings

PADDED = ("siglip", "siglip2")  # text models that were trained on captions padded to full length


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

    def __init__(self, model: nn.Module, settings: ModelSettings):
        from transformers.utils import cached_file

        encoder, project, own = _side(model, "vision_model", "visual_projection", settings)
        super().__init__(encoder, project, settings, own=own)
        size = getattr(encoder.config, "image_size", None)
        if size is None:
            raise ValueError(f"model.pretrained {settings.pretrained!r} takes no images")
        if settings.image_size != size:
            raise ValueError(f"the image model takes {size} pixels; set --model.image_size {size}")
        # Halves where none are told. A trained model has them among its weights, so its folder
        # need not be there any more.
        told = {}
        with contextlib.suppress(OSError):
            uri = cached_file(settings.pretrained, "preprocessor_config.json")
            told = json.loads(Path(uri).read_text())
        for name in ("mean", "std"):  # of a channel, of images in [0, 1]
            values = torch.tensor(told.get(f"image_{name}", [0.5] * 3))
            self.register_buffer(name, values[:, None, None])

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "PretrainedImageTower":
        if given.features is not None:
            raise ValueError("a pretrained image tower needs image shards, these hold features")
        return cls(given.model, settings)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images_BCHW))

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F): the encoder's pooled state."""
        pixels = (images_BCHW.float() / 255 - self.mean) / self.std
        out = self.encoder(pixel_values=pixels)
        return out.pooler_output if out.pooler_output is not None else out[0].mean(1)


class PretrainedTextTower(PretrainedTower):
    """(B, L) token ids, (B,) lengths -> (B, dim)."""

    def __init__(self, model: nn.Module, settings: ModelSettings):
        self.two_tower = hasattr(model, "text_model")
        encoder, project, own = _side(model, "text_model", "text_projection", settings)
        super().__init__(encoder, project, settings, own=own)

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
        if self.two_tower:  # its pooled state is what it was trained to match images with
            return out.pooler_output
        mask_BL1 = mask_BL[..., None].to(out.last_hidden_state.dtype)
        return (out.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)


def load(settings: ModelSettings, architecture: dict | None) -> nn.Module:
    """The Hugging Face model with its weights, or of a configuration, still untrained."""
    from transformers import AutoConfig, AutoModel

    if architecture is not None:
        return AutoModel.from_config(AutoConfig.for_model(**architecture))
    return _from_pretrained(AutoModel, settings)


def scale_and_bias(model: nn.Module | None) -> dict[str, float]:
    """A two-tower's learned `logit_scale` (a logarithm) and `logit_bias`, where it has them."""
    found = {name: getattr(model, name, None) for name in ("logit_scale", "logit_bias")}
    return {name: float(x.detach()) for name, x in found.items() if torch.is_tensor(x)}


def architecture(settings: ModelSettings) -> dict:
    """The configuration that `load` rebuilds the model from."""
    from transformers import AutoConfig

    return json.loads(_from_pretrained(AutoConfig, settings).to_json_string(use_diff=False))


def _from_pretrained(kind, settings: ModelSettings):
    if settings.pretrained is None:
        raise ValueError("model.pretrained is not given; give a model folder or a hub's name")
    try:
        return kind.from_pretrained(settings.pretrained)
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ImportError) or "sentencepiece" in str(error):
            what = f"model.pretrained {settings.pretrained!r}"
            raise ValueError(not_installed(what, error)) from error
        raise ValueError(
            f"no pretrained model {settings.pretrained!r}: {str(error).splitlines()[0]} "
            "(model.pretrained takes a model folder, or a name that the model hub knows)"
        ) from error


def tokens(settings: ModelSettings) -> PretrainedTokens:
    """The tokenizer that belongs to the model."""
    from transformers import AutoConfig, AutoTokenizer

    config = _from_pretrained(AutoConfig, settings)
    text = getattr(config, "text_config", config)
    tokenizer = _from_pretrained(AutoTokenizer, settings)
    length = min(settings.max_words, text.max_position_embeddings)
    padded = config.model_type in PADDED
    how = {
        "pad": tokenizer.pad_token_id or 0,
        "length": text.max_position_embeddings if padded else length,
        "padded": padded,
    }
    if tokenizer.is_fast:
        return PretrainedTokens(tokenizer.backend_tokenizer.to_str(), **how)
    return PretrainedPythonTokens(PretrainedPythonTokens.files_of(tokenizer), **how)


def _side(model, name: str, projection: str, settings: ModelSettings):
    """Encoder and projection of one side, and whether that is the model's own.

    A two-tower keeps its own space if both sides use it.
    """
    encoder = getattr(model, name, model)
    both = settings.image == settings.text == "pretrained"
    if encoder is not model and both:
        return encoder, getattr(model, projection, nn.Identity()), True
    return encoder, nn.Linear(encoder.config.hidden_size, settings.dim), False
