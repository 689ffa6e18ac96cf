"""A folder for sentence-transformers: `SentenceTransformer(folder).encode` gives unit vectors."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.export.hugging_face import HuggingFace, not_of_one_model
from pipeline.export.writing import BOTH, Loaded, Pictures, Sides, batched, write_words
from pipeline.models.tuning import merged
from pipeline.training.saved_model import SavedModel

INSTEAD = "--tower text takes the text tower alone; --to onnx and --to torch take any tower"


class Sentences:
    """Both towers of one model of transformers; or a text tower, with its projection."""

    needs: tuple[str, ...] = ("sentence_transformers",)

    def refusal(self, model: SavedModel, sides: Sides) -> str | None:
        settings = model.recipe.model
        if "text" not in sides:
            return "sentence-transformers has no module for an image tower alone; --to onnx has"
        if settings.text != "pretrained":
            return (
                f"sentence-transformers has no module for the text tower {settings.text!r}; "
                "--to onnx and --to torch take any tower"
            )
        tower: Any = model.towers.text
        if sides != BOTH and not _known(kind := type(tower.encoder.config)):
            return (
                f"a text tower alone is loaded by AutoModel, which has none of {kind.__name__}; "
                "leave out --tower, or take --to hf"
            )
        if sides != BOTH and not isinstance(tower.project, nn.Linear | nn.Identity):
            return (
                "sentence-transformers has no module for model.projection mlp; --to onnx and "
                "--to torch take any tower"
            )
        if sides == BOTH and (why := not_of_one_model(model, sides)):
            return f"{why.partition(';')[0]}; {INSTEAD}"
        return None

    def write(self, model: SavedModel, folder: Path, sides: Sides) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize

        with tempfile.TemporaryDirectory() as inner:
            if sides == BOTH:
                HuggingFace().write(model, Path(inner), sides)
                modules = [_transformer(model, inner)]
            else:
                modules = _text_alone(model, Path(inner))
            made = SentenceTransformer(modules=[*modules, Normalize()], device="cpu")
            made.save(str(folder), create_model_card=False)

    def read(self, folder: Path, model: SavedModel, sides: Sides) -> Loaded:
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(str(folder), device="cpu")

        def encoded(some: Sequence) -> torch.Tensor:
            return loaded.encode(list(some), convert_to_tensor=True, show_progress_bar=False)

        def images(some: Pictures) -> torch.Tensor:
            return batched(encoded, some)

        return Loaded(lambda some: batched(encoded, some), images if sides == BOTH else None)


def _known(config: type) -> bool:
    from transformers import MODEL_MAPPING

    return config in MODEL_MAPPING


def _transformer(model: SavedModel, folder: str, **how: Any):
    """The module of a folder of transformers, told how its texts are padded and cut."""
    from sentence_transformers.base.modules import Transformer

    state: Any = model.vocabulary.state
    text = {"truncation": True, "max_length": state["length"]}
    text["padding"] = "max_length" if state["padded"] else True
    return Transformer(folder, processing_kwargs={"text": text}, **how)


def _text_alone(model: SavedModel, folder: Path) -> list:
    """The modules of a text tower: its encoder, what pools its words, and its projection."""
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    tower: Any = merged(model.towers.text).cpu()
    tower.encoder.save_pretrained(folder)
    write_words(model, folder)
    if tower.two_tower:  # its own pooled state
        how = {"method": "forward", "method_output_name": "pooler_output"}
        modules = [
            _transformer(
                model,
                str(folder),
                modality_config={"text": how},
                module_output_name="sentence_embedding",
            )
        ]
    else:
        modules = [_transformer(model, str(folder))]
        modules.append(Pooling(tower.encoder.config.hidden_size, pooling_mode="mean"))
    if isinstance(project := tower.project, nn.Linear):
        modules.append(
            Dense(
                project.in_features,
                project.out_features,
                bias=project.bias is not None,
                activation_function=nn.Identity(),
                init_weight=project.weight.data,
                init_bias=None if project.bias is None else project.bias.data,
            )
        )
    return modules
