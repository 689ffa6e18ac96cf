"""A collection and a model to measure with, made on the spot: no file is needed for it.

Pictures are random fields with the spectrum of photographs, so that a JPEG of 224 pixels takes as
many bytes, and as long to decode, as one of Flickr8k; captions are random words. The model is of
CLIP's shape with random weights.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.labels import embed
from pipeline.sharding import ingest, shard
from schemas.settings import Recipe

WORDS = 3000
NAMES = [f"word{number}" for number in range(WORDS)]
INFO_NCE = {"info_nce": {"weight": 1.0, "temperature": 0.05}}
WITH_NDCG = {**INFO_NCE, "smooth_ndcg": {"weight": 2.0, "tau": 0.01}}


def make(folder: Path, quick: bool) -> None:
    """A run folder with shards and caption vectors in `run`, the model in `clip`."""
    counts = {"train": 96, "val": 8} if quick else {"train": 4608, "val": 256}
    pictures(folder / "pictures", counts, 32 if quick else 224)
    clip(folder / "clip", small=quick)
    recipe = recipe_of(folder, quick)
    root = str(folder / "run")
    for stage, work in ((ingest, ingest.write_part), (shard, shard.write_shard)):
        _finish(stage.plan(recipe, root), work)
    for step in embed.steps(recipe.embed, root):
        _finish(step.plan, step.make)


def _finish(plan, work) -> None:
    plan.finish({piece.name: work(piece) for piece in plan.pending})


def recipe_of(folder: Path, quick: bool) -> Recipe:
    """The settings that all measurements start from."""
    size, pretrained = (32, "pretrained") if quick else (224, "pretrained")
    return Recipe(
        name="gpu",
        source={
            "kind": "karpathy",
            "path": str(folder / "pictures" / "dataset.json"),
            "images": str(folder / "pictures"),
        },
        shard={"samples": 32 if quick else 512},
        embed={"encoder": "tfidf-256"},
        label={"map": "clip"},
        model={
            **{"image": pretrained, "text": pretrained, "pretrained": str(folder / "clip")},
            **{"image_size": size, "max_words": 77},
        },
        train={
            **{"batch_size": 16 if quick else 512, "optimizer": "adamw", "lr": 1e-5},
            **{"precision": "amp_bf16", "losses": WITH_NDCG},
        },
    )


def pictures(folder: Path, counts: dict[str, int], size: int) -> None:
    """JPEGs, and Karpathy's JSON with five captions each."""
    folder.mkdir(parents=True)
    draw, images = np.random.default_rng(0), []
    fields = [field(draw, 2 * size) for _ in range(12)]
    for split, count in counts.items():
        for number in range(count):
            name, picture = f"{split}-{number:05d}.jpg", cut(draw, fields, size)
            Image.fromarray(picture).save(folder / name, quality=90)
            sentences = [{"raw": " ".join(draw.choice(NAMES, 10))} for _ in range(5)]
            images.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))


def field(draw: np.random.Generator, size: int) -> np.ndarray:
    """A random field (size, size, 3) whose amplitudes fall as photographs' do, as 1 / frequency."""
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))[..., None]
    noise = np.fft.fft2(draw.standard_normal((size, size, 3)), axes=(0, 1))
    smooth = np.fft.ifft2(noise / np.maximum(waves, 1 / size), axes=(0, 1)).real
    return smooth / smooth.std()


def cut(draw: np.random.Generator, fields: list[np.ndarray], size: int) -> np.ndarray:
    """A picture (size, size, 3): a mixture of two fields' parts."""
    mixed = np.zeros((size, size, 3))
    for number in draw.integers(0, len(fields), 2):
        y, x = draw.integers(0, size, 2)
        mixed += fields[number][y : y + size, x : x + size]
    return np.clip(128 + 40 * mixed, 0, 255).astype(np.uint8)


def clip(folder: Path, *, small: bool) -> None:
    """A model of CLIP ViT-B/32's shape, or a tiny one, with a tokenizer of the captions' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    ids = {word: number for number, word in enumerate([*marks, *NAMES])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    how = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    torch.manual_seed(0)
    text = {"vocab_size": 49_408, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision: dict = {}
    if small:
        layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        layers["num_attention_heads"] = 2
        text |= {**layers, "vocab_size": len(ids)}
        vision |= {**layers, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
