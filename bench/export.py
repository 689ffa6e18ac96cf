"""Every export form on every kind of model: the largest difference of a coordinate of unit vectors.

python -m bench.export [--pairs 100]

Models are random and small, of the architectures' own classes; pairs are drawn, pictures of many
shapes and captions to beyond the models' length. Each form is read back by its own library.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline import models
from pipeline.errors import InputError
from pipeline.export import forms
from pipeline.export.writing import BOTH
from pipeline.models import Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.towers import preprocessing_of
from pipeline.training.saved_model import SavedModel
from schemas.settings import Recipe

SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIDE |= {"num_attention_heads": 2}
MARKS = ["<pad>", "<s>", "</s>", "<unk>"]
VISION = {**SIDE, "image_size": 48, "patch_size": 16}
LENGTH = 16  # tokens that a text model has places for
PRETRAINED = {"image": "pretrained", "text": "pretrained"}
SCRATCH: dict[str, Any] = {"dim": 16, "image_size": 32, "width": 4, "word_dim": 8, "max_words": 9}
# The settings of each kind, by what tells it; the first word of a pretrained one is its model.
KINDS: dict[str, dict[str, Any]] = {
    "clip": PRETRAINED,
    "clip, LoRA": {**PRETRAINED, "lora_rank": 2},
    "siglip": PRETRAINED,
    "vit + bert": PRETRAINED,
    "bert, regions": {**SCRATCH, "image": "regions", "text": "pretrained", "dim": 20},
    "pixels, gru": {**SCRATCH, "image": "pixels", "text": "gru"},
    "regions, bigru, gpo": {
        **SCRATCH,
        **{"image": "regions", "image_pooling": "gpo", "text": "bigru", "text_pooling": "gpo"},
    },
}


def words() -> list[str]:
    return [*MARKS, *sorted(set(forms.TEXT.split()))]


def pretrained(kind: str) -> torch.nn.Module:
    """A random model of transformers."""
    import transformers as hf

    text = {**SIDE, "vocab_size": len(words()), "max_position_embeddings": LENGTH}
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    both = {"text_config": {**text, **marks}, "vision_config": VISION}
    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(**both, projection_dim=24))
    if kind == "siglip":
        return hf.SiglipModel(hf.SiglipConfig(**both))
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**text))
    pair = {
        "vision_config": {**VISION, "model_type": "vit"},
        "text_config": {**text, "model_type": "bert"},
    }
    config = hf.VisionTextDualEncoderConfig(**pair, projection_dim=24)
    return hf.VisionTextDualEncoderModel(config)


def saved(model: torch.nn.Module, folder: Path) -> str:
    """The folder of a model with a tokenizer of `words` and an image processor's file."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(words())}
    tokenizer: Any = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    told = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 48, "width": 48},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    model.save_pretrained(folder)
    return str(folder)


def made(kind: str, folder: Path) -> SavedModel:
    """A random model of a kind."""
    torch.manual_seed(0)
    settings = dict(KINDS[kind])
    if "pretrained" in (settings["image"], settings["text"]):
        settings["pretrained"] = saved(pretrained(kind.split(",")[0]), folder)
    recipe = Recipe(name="random", model=settings)
    if settings["text"] == "pretrained":
        vocabulary = models.vocabulary_for(recipe.model, Counter)
    else:
        vocabulary = Vocabulary(["<pad>", "<unk>", *words()[len(MARKS) :]])
    features = 7 if settings["image"] == "regions" else None
    architecture, how = models.architecture(recipe.model), Preprocessing.squash(1)
    if features is None:
        how = preprocessing_of(recipe.model)
    towers = models.build(recipe.model, vocabulary=vocabulary, features=features).eval()
    with torch.no_grad():
        for name, parameter in towers.named_parameters():
            if "lora_B" in name:  # zeros at first
                parameter.normal_(0, 0.1)
    return SavedModel(towers, vocabulary, recipe, recipe.shard, features, how, architecture)


def tried(model: SavedModel, to: str, folder: Path, pairs: int) -> Iterator[tuple[str, Any]]:
    """(tower, the largest difference or why there is none), of the whole and of towers alone."""
    alone = [("image",), ("text",)] if to in ("hf", "sentence-transformers") else []
    for sides in (BOTH, *alone):
        label = "" if sides == BOTH else " alone"
        try:
            found = forms.export(model, to, folder / f"{to}-{'-'.join(sides)}", sides, pairs)
        except InputError as refused:
            yield " + ".join(sides) + label, str(refused)
            continue
        for tower, value in found.differences.items():
            yield tower + label, value
        if found.unchecked:
            yield " + ".join(sides), found.unchecked


def rows(pairs: int) -> Iterator[list[str]]:
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model = made(kind, folder / "base")
            for to in forms.FORMS:
                for tower, found in tried(model, to, folder, pairs):
                    cell = found if isinstance(found, str) else f"{found:.1e}"
                    yield [kind, to, tower, cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    print("| model | form | tower | largest difference |\n| --- | --- | --- | --- |")
    for row in rows(pairs):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
