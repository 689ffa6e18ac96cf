"""A folder for open_clip: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.export.hugging_face import not_of_one_model, whole
from pipeline.export.writing import (
    BOTH,
    Loaded,
    Pictures,
    Sides,
    batched,
    write_json,
    write_words,
)
from pipeline.models.preprocessing import Preprocessing
from pipeline.training.saved_model import SavedModel

EPS = 1e-5  # of open_clip's layer norms, unless told otherwise
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
State = dict[str, torch.Tensor]


class OpenClip:
    """A CLIP with a vision transformer."""

    needs: tuple[str, ...] = ("open_clip",)

    def refusal(self, model: SavedModel, sides: Sides) -> str | None:
        if sides != BOTH:
            return "open_clip has no model of one tower; leave out --tower, or take --to hf"
        if why := not_of_one_model(model, sides):
            return why
        about: Any = model.architecture
        if about["model_type"] != "clip":
            return (
                f"open_clip's towers are CLIP's, and this is a {about['model_type']}; --to hf and "
                "--to onnx hold it"
            )
        acts = {about[f"{side}_config"]["hidden_act"] for side in ("vision", "text")}
        if len(acts) > 1 or not acts <= ACTIVATIONS.keys():
            said = f"open_clip has {' or '.join(ACTIVATIONS)} in both towers, and this model "
            return f"{said}{', '.join(sorted(acts))}; --to hf holds it"
        return _not_its_pictures(model.preprocessing)

    def write(self, model: SavedModel, folder: Path, sides: Sides) -> None:
        exported: Any = whole(model)
        config, how = exported.config, model.preprocessing
        write_json(
            folder / "open_clip_config.json",
            {
                "model_cfg": {
                    "embed_dim": config.projection_dim,
                    "quick_gelu": ACTIVATIONS[config.vision_config.hidden_act],
                    "vision_cfg": _vision(config.vision_config),
                    "text_cfg": _text(config.text_config, model.vocabulary),
                },
                "preprocess_cfg": {
                    "size": list(how.shape),
                    "mean": list(how.mean),
                    "std": list(how.std),
                    "interpolation": how.interpolation,
                    "resize_mode": "shortest" if how.crop else "squash",
                },
            },
        )
        state = converted(exported.state_dict(), config)
        save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})
        write_words(model, folder)

    def read(self, folder: Path, model: SavedModel, sides: Sides) -> Loaded:
        # Installed by hand: its torchvision has to fit torch.
        open_clip = importlib.import_module("open_clip")
        name = f"local-dir:{folder}"
        loaded, _, transform = open_clip.create_model_and_transforms(name)
        tokens: Any = open_clip.get_tokenizer(name)
        loaded.eval()
        preprocess: Callable[..., torch.Tensor] = transform

        def texts(some: Sequence[str]) -> torch.Tensor:
            return loaded.encode_text(tokens(list(some)))

        def images(some: Pictures) -> torch.Tensor:
            given = [_to_crop_alike(picture, model.preprocessing) for picture in some]
            return loaded.encode_image(torch.stack([preprocess(picture) for picture in given]))

        return Loaded(lambda some: batched(texts, some), lambda some: batched(images, some))


def converted(state: State, config: Any) -> State:
    """The weights of a CLIP of transformers under the names that open_clip has."""
    out: State = {"logit_scale": state["logit_scale"]}
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    table = "embeddings.position_embedding.weight"
    out["visual.positional_embedding"] = state[f"vision_model.{table}"]
    out["positional_embedding"] = state[f"text_model.{table}"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T
    out["text_projection"] = state["text_projection.weight"].T
    for part in ("weight", "bias"):
        out[f"visual.ln_pre.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        out[f"visual.ln_post.{part}"] = state[f"vision_model.post_layernorm.{part}"]
        out[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
    for side, before in (("vision", "visual.transformer"), ("text", "transformer")):
        for layer in range(getattr(config, f"{side}_config").num_hidden_layers):
            block = _block(state, f"{side}_model.encoder.layers.{layer}")
            out |= {f"{before}.resblocks.{layer}.{name}": value for name, value in block.items()}
    return {name: value.detach().contiguous().clone() for name, value in out.items()}


def _block(state: State, layer: str) -> State:
    """A block's weights: open_clip has query, key and value in one."""
    out = {}
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for part in ("weight", "bias"):
        parts = [state[f"{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"]
        out[f"attn.in_proj_{part}"] = torch.cat(parts)
        out |= {f"{own}.{part}": state[f"{layer}.{theirs}.{part}"] for own, theirs in names.items()}
    return out


def _vision(config: Any) -> dict[str, Any]:
    return {
        **_sizes(config),
        "head_width": config.hidden_size // config.num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def _text(config: Any, vocabulary: Any) -> dict[str, Any]:
    """A text tower's; its last state is where a caption ends."""
    first = config.eos_token_id == 2  # as transformers has it: of CLIP's first files, which err
    return {
        **_sizes(config),
        "heads": config.num_attention_heads,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "pool_type": "argmax" if first else "eos",
        "eos_id": config.eos_token_id,
        "pad_id": vocabulary.fill,
        "hf_tokenizer_name": "tokenizer.json",  # that of the folder, whatever this says
    }


def _sizes(config: Any) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        **({"norm_kwargs": {"eps": eps}} if (eps := config.layer_norm_eps) != EPS else {}),
    }


def _to_crop_alike(picture: Any, how: Preprocessing) -> Any:
    """The picture, cropped before where its middle lies between two pixels.

    There transformers, and the model, round down; torchvision rounds to an even number.
    """
    if not isinstance(how.resize, int):
        return picture
    long = int(how.resize * max(picture.size) / min(picture.size))
    return how.picture(picture) if (long - how.resize) % 2 else picture


def _not_its_pictures(how: Preprocessing) -> str | None:
    """Why open_clip cannot make pictures so; None where it can."""
    shorter = how.crop is not None and how.crop == (how.resize, how.resize)
    squash = how.crop is None and isinstance(how.resize, tuple)
    levels = abs(how.rescale * 255 - 1) < 1e-6  # its pixels are of [0, 1]
    if levels and (shorter or squash) and how.interpolation in ("bilinear", "bicubic"):
        return None
    return (
        f"open_clip cannot make pictures as this model has them ({how}): it crops a square out of "
        "one whose shorter side is as long, or squashes, bilinear or bicubic; --to hf does"
    )
