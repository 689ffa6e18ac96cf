"""Towers of Hugging Face models, made tiny on the spot."""

import io
import json
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from pipeline import models as towers
from pipeline.evaluation import tower_vectors
from pipeline.models import TwoTower
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.storage import store
from pipeline.training import saved_model
from pipeline.training.data import Split
from schemas.settings import ModelSettings
from tests.helpers import odd_pictures
from tests.helpers.paths import ROOT
from tests.helpers.stages import TINY, finish
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its users)
    fit,
    recipe_with,
)

SIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SIDE |= {"num_attention_heads": 2}
CAPTIONS = ["a red circle on the sand", "star", "a star and a blue circle on grass"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(" ".join(CAPTIONS).split()))]
TEXT = {**SIDE, "vocab_size": len(WORDS), "max_position_embeddings": 12}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {**SIDE, "image_size": 48, "patch_size": 16}


def save(folder: Path, model) -> str:
    """The folder of a model with a tokenizer of WORDS and a preprocessor."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=marks)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return save(tmp_path_factory.mktemp("clip"), CLIPModel(config))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = SiglipConfig(text_config=TEXT, vision_config=VISION)
    return save(tmp_path_factory.mktemp("siglip"), SiglipModel(config))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = BertConfig(**SIDE, vocab_size=len(WORDS), max_position_embeddings=12)
    return save(tmp_path_factory.mktemp("bert"), BertModel(config))


def build(folder: str, **changed) -> tuple[TwoTower, PretrainedTokens]:
    settings = {"image": "pretrained", "text": "pretrained"} | changed
    settings = ModelSettings(pretrained=folder, **settings)
    vocabulary = towers.vocabulary_for(settings, Counter)
    features = 7 if settings.image == "regions" else None
    return towers.build(settings, vocabulary=vocabulary, features=features), vocabulary


def pictures(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


def test_clip_towers_give_the_models_own_features(clip):
    model, vocabulary = build(clip)
    whole = AutoModel.from_pretrained(clip).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.inference_mode():
        images, texts = model.eval()(pictures(), *vocabulary.encode(CAPTIONS, 64))
        own = whole.get_image_features(pixel_values=(pictures() / 255 - mean) / std).pooler_output
        torch.testing.assert_close(images, torch.nn.functional.normalize(own, dim=1))
        for caption, vector in zip(CAPTIONS, texts, strict=True):
            ids = vocabulary.tokenizer.encode(caption).ids
            own = whole.get_text_features(input_ids=torch.tensor([ids])).pooler_output
            torch.testing.assert_close(vector, torch.nn.functional.normalize(own, dim=1)[0])


def test_siglip_reads_captions_padded_to_full_length(siglip):
    model, vocabulary = build(siglip)
    whole = AutoModel.from_pretrained(siglip).eval()
    words, lengths = vocabulary.encode(CAPTIONS, 64)
    assert words.shape == (3, 12) and lengths.tolist() == [12] * 3
    with torch.inference_mode():
        own = whole.get_text_features(input_ids=words).pooler_output
        texts = model.eval().encode_text(words, lengths)
    torch.testing.assert_close(texts, torch.nn.functional.normalize(own, dim=1))


def test_a_text_model_alone_stands_beside_another_image_tower(bert):
    model, vocabulary = build(bert, image="regions", dim=20)
    words, lengths = vocabulary.encode(CAPTIONS, 64)
    with torch.inference_mode():
        among = model.eval().encode_text(words, lengths)
        alone = model.encode_text(*vocabulary.encode(CAPTIONS[:1], 64))
    assert among.shape == (3, 20)
    torch.testing.assert_close(alone[0], among[0])


def test_long_captions_keep_their_end_mark(clip):
    _, vocabulary = build(clip)
    words, lengths = vocabulary.encode(["a " * 100], 64)
    assert lengths.tolist() == [12] and words[0, -1] == 2


def test_the_first_layers_are_frozen_and_rates_fall_towards_them(clip):
    model, _ = build(clip, freeze=1, layer_decay=0.5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("layers.0." in name or "embeddings" in name for name in trained)
    assert any("layers.1." in name for name in trained)
    names = dict(model.named_parameters())
    scale = {
        part: {model.lr_scale(n) for n in names if part in n}
        for part in ("layers.0.", "layers.2.", "embeddings", "project.", "final_layer_norm")
    }
    assert scale == {
        "layers.0.": {0.5**3},
        "layers.2.": {0.5},
        "embeddings": {0.5**4},
        "project.": {1.0},
        "final_layer_norm": {1.0},
    }


def test_lora_trains_small_updates_and_the_projection(clip):
    model, vocabulary = build(clip, lora_rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or ".project." in f".{n}" for n in trained)
    plain, _ = build(clip)
    with torch.inference_mode():  # an update starts at nothing
        torch.testing.assert_close(
            model.eval()(pictures(), *vocabulary.encode(CAPTIONS, 64)),
            plain.eval()(pictures(), *vocabulary.encode(CAPTIONS, 64)),
        )


def test_recomputed_activations_give_the_same_gradients(clip):
    grads = []
    for recompute in (False, True):
        model, vocabulary = build(clip, gradient_checkpointing=recompute)
        images, texts = model.train()(pictures(), *vocabulary.encode(CAPTIONS, 64))
        (images * texts).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"image_size": 50}, "cannot take 50 × 50 pixels.*--model.image_size 48"),
        ({"pretrained": None}, "model.pretrained is not given"),
        ({"pretrained": "/nowhere"}, "no pretrained model '/nowhere'"),
        ({"text": "package.missing:Tower"}, "cannot be imported"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_sentence(clip, changed, sentence):
    settings = {"image": "pretrained", "text": "gru", "pretrained": clip}
    words = towers.Vocabulary.of(CAPTIONS, min_count=1)
    with pytest.raises(ValueError, match=sentence):
        settings = ModelSettings(**settings | changed)
        towers.build(settings, vocabulary=words, features=None)


class Doubled(torch.nn.Module):
    """An image tower of one's own."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = torch.nn.Linear(3, dim)

    @classmethod
    def from_settings(cls, settings, given):
        return cls(settings.dim)

    def forward(self, images):
        return self.project(images.float().mean((2, 3)))


def test_a_tower_of_ones_own_is_named_in_the_recipe():
    settings = ModelSettings(image="tests.pipeline.models.test_pretrained:Doubled", dim=5)
    words = towers.Vocabulary.of(CAPTIONS, min_count=1)
    model = towers.build(settings, vocabulary=words, features=None)
    assert model.encode_image(pictures()).shape == (3, 5)


def test_a_trained_clip_needs_its_folder_no_more(data, clip, tmp_path):  # noqa: F811
    recipe, root = data
    folder = tmp_path / "weights"
    shutil.copytree(clip, folder)
    flags = ["--model.image", "pretrained", "--model.text", "pretrained"]
    flags += ["--model.pretrained", str(folder), "--model.freeze", "1", "--train.epochs", "1"]
    recipe = recipe_with(recipe.embed.encoder, *TINY, *flags)
    fit(recipe, root, "clip")
    shutil.rmtree(folder)
    loaded = saved_model.load_model(f"{root}/5-model/clip")
    model, vocabulary = loaded.towers, loaded.vocabulary
    with torch.inference_mode():
        images, texts = model(pictures(), *vocabulary.encode(CAPTIONS, 64))
    assert images.shape == texts.shape == (3, 24)
    assert model.image.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    how = loaded.preprocessing
    assert how == towers.preprocessing_of(ModelSettings(image="pretrained", pretrained=clip))
    picture = odd_pictures.scene((90, 60))
    own = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48, do_normalize=False)
    pixels = torch.from_numpy(own(picture, return_tensors="np", do_rescale=False).pixel_values)
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(pixels), loaded.embed_images([picture]))
    assert loaded.embed_images([]).shape == loaded.embed_texts([]).shape == (0, 24)
    finish(tower_vectors.plan_vectors(recipe, root, "clip"), tower_vectors.write_vectors)
    scores = tower_vectors.read(tower_vectors.evaluated(recipe, root, "clip"))
    split = Split(root, recipe.evaluate.split, preprocessing=how)
    found = loaded.embed_images([split.payload(row) for row in range(len(split))])
    torch.testing.assert_close(found, scores.images.float(), atol=1e-6, rtol=0)
    index = store.read_json(f"{root}/5-model/clip/index.json")  # as of a model of before
    del index["pieces"][0]["preprocessing"]
    index["pieces"][0]["recipe"]["model"]["image_size"] = 48
    store.write_json(f"{root}/5-model/clip/index.json", index)
    assert saved_model.load_model(f"{root}/5-model/clip").preprocessing == Preprocessing.squash(48)
    before = CLIPModel.from_pretrained(clip).vision_model.state_dict()
    after = model.image.encoder.state_dict()
    first, last = (f"encoder.layers.{n}.mlp.fc1.weight" for n in (0, 2))
    assert torch.equal(before[first], after[first]) and not torch.equal(before[last], after[last])


def test_a_longer_and_larger_model_is_trained_and_made_again(data, clip):  # noqa: F811
    """What is cut is counted, and the folder holds the sizes."""
    recipe, root = data
    flags = ["--model.image", "pretrained", "--model.text", "pretrained", "--train.epochs", "1"]
    flags += ["--model.pretrained", clip, "--model.image_size", "64"]
    fit(recipe_with(recipe.embed.encoder, *TINY, *flags, "--model.max_words", "16"), root, "large")
    loaded = saved_model.load_model(f"{root}/5-model/large")
    assert loaded.preprocessing.shape == (64, 64)
    named = loaded.towers.text.named_parameters()
    (table,) = (value for name, value in named if "position_embedding" in name)
    assert len(table) == 16 and len(loaded.embed_texts(["a star " * 20])) == 1
    assert loaded.cut_texts(["a star " * 20, "a star"]) == 1


# ---- tokenizers that are not of the tokenizers package -----------------------------------------


@pytest.fixture(scope="module")
def sentence_pieces(tmp_path_factory) -> str:
    """The folder of a SigLIP as it is published: the model beside a SentencePiece file."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20), model_writer=written, vocab_size=len(WORDS) + 8,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sentence-pieces")
    (folder / "spiece.model").write_bytes(written.getvalue())
    kind = {"image_processor_type": "SiglipImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind))
    about = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 12, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    text = TEXT | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config=VISION)
    SiglipModel(config).save_pretrained(folder)
    return str(folder)


def test_a_siglip_of_sentence_pieces_gives_the_models_own_features(sentence_pieces):
    model, vocabulary = build(sentence_pieces)
    tokenizer = AutoTokenizer.from_pretrained(sentence_pieces)
    assert not tokenizer.is_fast
    long = ["A red circle, on THE sand!", "star " * 40]
    own = tokenizer(long, padding="max_length", max_length=12, truncation=True)["input_ids"]
    words, lengths = vocabulary.encode(long, 64)
    assert words.tolist() == own and lengths.tolist() == [12, 12]
    whole = AutoModel.from_pretrained(sentence_pieces).eval()
    with torch.inference_mode():
        texts = model.eval().encode_text(words, lengths)
        own = whole.get_text_features(input_ids=words).pooler_output
    torch.testing.assert_close(texts, torch.nn.functional.normalize(own, dim=1))


def test_it_is_made_again_from_what_a_trained_model_keeps(sentence_pieces, tmp_path):
    copy = tmp_path / "weights"
    shutil.copytree(sentence_pieces, copy)
    _, vocabulary = build(str(copy))
    state = json.loads(json.dumps(vocabulary.state))
    shutil.rmtree(copy)
    again = towers.vocabulary_of(state)
    assert len(again) == len(vocabulary)
    for one, other in zip(again.encode(CAPTIONS, 64), vocabulary.encode(CAPTIONS, 64), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("folder", ["sentence_pieces", "siglip"])
def test_unknown_tokens_are_named(request, folder):
    _, vocabulary = build(request.getfixturevalue(folder))
    assert vocabulary.unknown("a star 狗") == ["狗"]
    assert vocabulary.unknown_share(CAPTIONS) == 0 < vocabulary.unknown_share(["狗 star"]) < 1


def test_a_missing_package_is_named_with_the_command(sentence_pieces, monkeypatch):
    """As on a machine without sentencepiece."""
    state = build(sentence_pieces)[1].state
    missing = "\nSiglipTokenizer requires the SentencePiece library but it was not found"

    def none(*given, **how):
        raise ImportError(missing)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", none)
    said = r'needs a package.*SentencePiece library.*pip install "halftone-itr\[sentencepiece\]"'
    for make in (lambda: build(sentence_pieces), lambda: towers.vocabulary_of(state)):
        with pytest.raises(ValueError, match=said):
            make()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "sentencepiece" in project["optional-dependencies"]
