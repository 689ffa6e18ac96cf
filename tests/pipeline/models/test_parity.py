"""Towers give the features of transformers' own model and processor, of pictures and captions."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import normalize

from pipeline import models as towers
from pipeline.models.positions import image_positions, text_positions
from pipeline.sharding.decoding import decode
from schemas.settings import ModelSettings
from tests.pipeline.models.test_preprocessing import PICTURES
from tests.pipeline.models.test_pretrained import CAPTIONS, SIDE, TEXT, VISION, WORDS, save

FILES = {name: data for name, data in PICTURES.items() if name.endswith(("jpg", "0", "7"))}
FILES = {name: data for name, data in FILES.items() if name not in ("turned.jpg", "ink.jpg")}
CUT = [*CAPTIONS, "a star on the sand and a " * 9, "circle " * 30]
ENDS = {"projection_dim": 24}


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, **ENDS)
    return transformers.CLIPModel(config), transformers.CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )


def siglip():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessor(
        size={"height": 48, "width": 48}
    )


def siglip2():
    """Of one shape: a SigLIP by its class, bilinear, with a tokenizer of its own."""
    model, _ = siglip()
    return model, transformers.SiglipImageProcessor(size={"height": 48, "width": 48}, resample=2)


def blip():
    text = {**TEXT, "encoder_hidden_size": 32, "projection_dim": 24, "is_decoder": False}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, **ENDS)
    return transformers.BlipModel(config), transformers.BlipImageProcessor(
        size={"height": 48, "width": 48}
    )


def blip_itc():
    text = {**TEXT, "encoder_hidden_size": 32, "is_decoder": False}
    config = transformers.BlipConfig(
        text_config=text, vision_config=VISION, image_text_hidden_size=24
    )
    return transformers.BlipForImageTextRetrieval(config), blip()[1]


def vit_bert():
    bert = transformers.BertConfig(**SIDE, vocab_size=len(WORDS), max_position_embeddings=12)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VISION), bert, **ENDS
    )
    model = transformers.VisionTextDualEncoderModel(config=config)
    return model, transformers.ViTImageProcessor(size={"height": 48, "width": 48})


MODELS = {f.__name__: f for f in (clip, siglip, siglip2, blip, blip_itc, vit_bert)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, processor = make()
        for parameter in model.parameters():  # of nothing a small model is nearly nothing
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp(name)
        save(folder, model)
        processor.save_pretrained(folder)
        if name == "siglip2":
            gemma(folder)
        found[name] = str(folder)
    return found


def gemma(folder) -> None:
    """Published tokenizers of SigLIP 2: lower case, an end mark, no mask."""
    ids = {word: n for n, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS[4:]])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 1)]
    )
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    how = {"model_input_names": ["input_ids"], "padding_side": "right"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **marks, **how
    ).save_pretrained(folder)


def built(folder: str, **changed):
    """Towers, words and preprocessing of a folder."""
    settings = ModelSettings(image="pretrained", text="pretrained", pretrained=folder, **changed)
    vocabulary = towers.vocabulary_for(settings, Counter)
    model = towers.build(settings, vocabulary=vocabulary, features=None)
    return model.eval(), vocabulary, towers.preprocessing_of(settings)


def pixels_of(how) -> torch.Tensor:
    return torch.from_numpy(np.stack([decode(data, how) for data in FILES.values()]))


def own_of(folder: str):
    kind = json.loads(Path(folder, "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()


@torch.inference_mode()
def features(own, folder: str, files, texts, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers makes of them, by its processor and tokenizer as its pages call them."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    pixels = processor(opened, return_tensors="pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    full = "max_length" if isinstance(own, transformers.SiglipModel) else True
    read = tokenizer(texts, padding=full, max_length=12, truncation=True, return_tensors="pt")
    given = {"input_ids": read["input_ids"]}
    if full is True:  # SigLIP was trained on captions with their padding, which it reads
        given["attention_mask"] = read["attention_mask"]
    if isinstance(own, transformers.BlipForImageTextRetrieval):
        states = own.text_encoder(**given).last_hidden_state
        image = own.vision_model(**pixels, **how).last_hidden_state
        return own.vision_proj(image[:, 0]), own.text_proj(states[:, 0])
    image, text = own.get_image_features(**pixels, **how), own.get_text_features(**given)
    return image.pooler_output, text.pooler_output


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, normalize(expected, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_features_are_those_of_transformers(folders, name):
    """Of pictures of odd shapes, and of captions that are cut."""
    folder = folders[name]
    model, vocabulary, how = built(folder)
    images, texts = features(own_of(folder), folder, FILES.values(), CUT)
    pixels = pixels_of(how)
    close(model.encode_image(pixels), images)
    close(model.encode_text(*vocabulary.encode(CUT, None)), texts)
    assert vocabulary.cut(CUT, None) == 2


@torch.inference_mode()
def test_the_square_of_before_gave_other_features(folders):
    folder = folders["clip"]
    model, _, how = built(folder)
    images, _ = features(own_of(folder), folder, FILES.values(), CUT)
    before = towers.preprocessing_of(ModelSettings(image_size=48))
    pixels = pixels_of(before)
    cosines = (model.encode_image(pixels) * normalize(images, dim=1)).sum(1)
    assert cosines.min() < 0.9 and (cosines < 0.999).sum() > len(cosines) / 2


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_larger_image_interpolates_the_positions(folders, name, caplog):
    folder, size = folders[name], 64
    model, _, how = built(folder, image_size=size)
    assert how.shape == (size, size)
    assert "images of 64 pixels in place of 48: tables of positions are interp" in caplog.text
    own = own_of(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    large = {"height": size, "width": size}
    shorter = "shortest_edge" in json.loads(processor.to_json_string())["size"]
    processor = type(processor)(
        **processor.to_dict()
        | {"size": {"shortest_edge": size} if shorter else large, "crop_size": large}
    )
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in FILES.values()]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    if name == "blip_itc":
        states = own.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        expected = own.vision_proj(states[:, 0])
    else:
        found = own.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        expected = found.pooler_output
    ours = pixels_of(how)
    close(model.encode_image(ours), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_more_words_extend_the_positions(folders, name):
    """A short caption keeps its vector, and of a long one the end is read."""
    long = ["a star on sand and a " * 3 + end for end in ("the circle", "blue the")]
    vectors = {}
    for words in (None, 30):
        model, vocabulary, _ = built(folders[name], max_words=words)
        assert vocabulary.longest(words) == (words or 12)
        assert vocabulary.cut(long, words) == (0 if words else 2)
        vectors[words] = model.encode_text(*vocabulary.encode(["star", *long], words))
    if not name.startswith("siglip"):  # which reads its padding
        torch.testing.assert_close(vectors[None][0], vectors[30][0], atol=1e-5, rtol=0)
    same, other = (float((v[1] * v[2]).sum()) for v in (vectors[None], vectors[30]))
    assert same == pytest.approx(1, abs=1e-5) and other < 0.999


def test_tables_of_positions():
    grid = torch.arange(9.0).reshape(3, 3)
    table = torch.cat([torch.tensor([[-1.0], [-2.0]]), grid.reshape(9, 1)])
    found = image_positions(table, 38, 9)
    assert found[:2].flatten().tolist() == [-1, -2]
    rows = found[2:].reshape(6, 6)
    assert (rows.diff(dim=0) > 0).all() and (rows.diff(dim=1) > 0).all()
    torch.testing.assert_close(image_positions(table, 11, 9), table)
    clip_table = torch.arange(77.0)[:, None]
    longer = text_positions(clip_table, 248).flatten()
    assert longer[:20].tolist() == list(range(20)) and float(longer[-1]) == pytest.approx(76)
    assert longer[20:].diff().numpy() == pytest.approx(56 / 227, abs=1e-4)


def test_half_precision_weights_are_read_in_full(folders, tmp_path):
    folder = folders["clip"]
    own_of(folder).half().save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    model, _, _ = built(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_of_another_class_are_refused(folders, tmp_path):
    """Transformers would fill up what is missing with random numbers."""
    source = Path(folders["blip_itc"])
    for name in ("config", "preprocessor_config", "tokenizer", "tokenizer_config"):
        text = (source / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(text.replace("BlipForImageTextRetrieval", "Blip"))
    shutil.copy(source / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"\(Blip\) has no weights for .* of BlipModel, such as"):
        built(str(tmp_path))
