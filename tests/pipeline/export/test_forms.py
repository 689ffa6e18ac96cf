"""Exports are read back by the library that each form is for, and give the model's own vectors."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import export as bench
from pipeline.errors import InputError
from pipeline.export import forms, graphs
from pipeline.export.given import given
from pipeline.export.writing import BOTH, payloads
from pipeline.models.backbones.projection import ResidualProjection
from pipeline.models.tuning import merged

PAIRS = 100
WORKS = [
    ("clip", "hf", BOTH),
    ("clip", "hf", ("image",)),
    ("clip", "hf", ("text",)),
    ("clip", "sentence-transformers", BOTH),
    ("clip", "sentence-transformers", ("text",)),
    ("clip, LoRA", "hf", BOTH),
    ("clip, LoRA", "onnx", BOTH),
    ("siglip", "hf", BOTH),
    ("siglip", "hf", ("text",)),
    ("siglip", "sentence-transformers", BOTH),
    ("siglip", "onnx", BOTH),
    ("vit + bert", "hf", BOTH),
    ("vit + bert", "sentence-transformers", BOTH),
    ("bert, regions", "sentence-transformers", ("text",)),
    ("pixels, gru", "torch", BOTH),
    ("vit + bert", "torch", BOTH),
    ("regions, bigru, gpo", "onnx", BOTH),
]
REFUSED = [
    ("pixels, gru", "hf", BOTH, "no class for the image tower 'pixels'; --to onnx"),
    ("pixels, gru", "open_clip", BOTH, "no class for the image tower"),
    ("pixels, gru", "sentence-transformers", BOTH, "no module for the text tower 'gru'"),
    ("bert, regions", "hf", BOTH, "no class for the image tower 'regions'"),
    ("bert, regions", "hf", ("text",), "its projection is new, so no class"),
    ("bert, regions", "sentence-transformers", BOTH, "--tower text takes the text tower alone"),
    ("clip", "sentence-transformers", ("image",), "no module for an image tower alone"),
    ("vit + bert", "hf", ("image",), "one tower of a vision-text-dual-encoder"),
    ("siglip", "sentence-transformers", ("text",), "AutoModel, which has none of SiglipTextConfig"),
    ("siglip", "open_clip", BOTH, "this is a siglip; --to hf"),
    ("clip", "open_clip", ("text",), "no model of one tower"),
    ("clip", "onxx", BOTH, "did you mean 'onnx'"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model of each kind, made when it is asked for."""
    known: dict = {}

    def model(kind: str):
        if kind not in known:
            known[kind] = bench.made(kind, tmp_path_factory.mktemp("base"))
        return known[kind]

    return model


@pytest.mark.parametrize(("kind", "to", "sides"), WORKS)
def test_what_is_read_back_gives_the_models_vectors(models, kind, to, sides, tmp_path):
    found = forms.export(models(kind), to, tmp_path / "out", sides, PAIRS)
    assert found.differences.keys() == set(sides) and not found.unchecked
    limit = 1e-4 if to == "onnx" else 1e-5
    assert max(found.differences.values()) <= limit, found.differences
    written = {path.name for path in found.folder.iterdir()}
    if "image" in sides and models(kind).features is None and to != "sentence-transformers":
        assert "preprocessor_config.json" in written
    if "text" in sides:
        assert written & {"tokenizer.json", "vocabulary.json"}


@pytest.mark.parametrize(("kind", "to", "sides", "sentence"), REFUSED)
def test_what_a_form_cannot_hold_is_refused(models, kind, to, sides, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        forms.export(models(kind), to, tmp_path / "out", sides)
    assert not (tmp_path / "out").exists()  # nothing half-made


def test_a_projection_with_a_hidden_layer_is_refused_where_no_module_holds_it(models, tmp_path):
    model = models("bert, regions")
    towers = copy.deepcopy(model.towers)
    wide = towers.text.project.in_features
    towers.text.project = ResidualProjection(wide, model.dim, 0.0)
    model = replace(model, towers=towers.eval())
    with pytest.raises(InputError, match=r"no module for model\.projection mlp; --to onnx"):
        forms.export(model, "sentence-transformers", tmp_path / "out", ("text",))
    found = forms.export(model, "torch", tmp_path / "whole", ("text",))
    assert found.differences["text"] <= 1e-5


def test_an_export_that_gives_other_vectors_is_refused(models, tmp_path, monkeypatch):
    model = models("clip")

    def other(model):
        exported = whole(model)
        exported.visual_projection.weight.data.mul_(-1)
        return exported

    from pipeline.export import hugging_face

    whole = hugging_face.whole
    monkeypatch.setattr(hugging_face, "whole", other)
    with pytest.raises(InputError, match="the exported image tower differ.*nothing was written"):
        forms.export(model, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_stays_as_it_is(models, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        forms.export(models("clip"), "hf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_adapters_are_merged_and_the_model_keeps_its_own(models):
    model = models("clip, LoRA").towers
    plain = merged(model)
    assert any("lora_" in name for name in model.state_dict())
    assert not any("lora_" in name or "base_layer" in name for name in plain.state_dict())


def test_programs_load_with_torch_alone(models, tmp_path):
    """In a process that cannot import this package."""
    model = models("regions, bigru, gpo")
    found = forms.export(model, "torch", tmp_path / "out", pairs=PAIRS)
    assert max(found.differences.values()) <= 1e-5
    about = json.loads((tmp_path / "out" / "towers.json").read_text())
    longest = about["text"]["words"]["shape"][1]
    code = (
        "import sys, torch; program = torch.export.load('text.pt2').module();"
        f"words = torch.ones(3, {longest}, dtype=torch.long);"
        f"print(program(words, torch.tensor([{longest}, 2, 1])).norm(dim=1).tolist());"
        "assert 'pipeline' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx([1.0] * 3, abs=1e-5)
    assert graphs.INPUTS["text"] == ["words", "lengths"]


def test_the_scale_of_the_scores_is_exported_where_it_was_learned(models, tmp_path):
    from transformers import AutoModel

    model = models("siglip")
    model.towers.learned = torch.nn.ParameterDict(
        {"sigmoid_scale": torch.tensor(3.5), "sigmoid_bias": torch.tensor(-7.0)}
    )
    try:
        forms.export(model, "hf", tmp_path / "out", pairs=2)
    finally:
        del model.towers.learned
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert (loaded.logit_scale.item(), loaded.logit_bias.item()) == (3.5, -7.0)


def test_a_name_that_is_no_model_is_told(tmp_path):
    with pytest.raises(InputError, match="no trained model in .*name a run folder"):
        given(str(tmp_path))
    torn = tmp_path / "step-00000001"
    torn.mkdir()
    (torn / "checkpoint.json").write_text("{}")
    with pytest.raises(InputError, match="checkpoint of a training that has not finished"):
        given(str(torn))


# ---- open_clip's towers, restated: the package itself is not installed with the tests -----------


def blocks(state, prefix: str, x_BLD, heads: int, mask=None):
    """Residual attention blocks as open_clip has them, with CLIP's quick GELU."""
    norm, linear = torch.nn.functional.layer_norm, torch.nn.functional.linear
    count = sum(name.startswith(prefix) and name.endswith("ln_1.bias") for name in state)
    for number in range(count):
        own = {
            name.removeprefix(f"{prefix}.resblocks.{number}."): value
            for name, value in state.items()
            if name.startswith(f"{prefix}.resblocks.{number}.")
        }
        width = x_BLD.shape[-1]
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict(
            {n.removeprefix("attn."): v for n, v in own.items() if n.startswith("attn.")}
        )
        y = norm(x_BLD, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x_BLD = x_BLD + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = norm(x_BLD, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x_BLD = x_BLD + linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x_BLD


def test_open_clips_towers_give_the_models_vectors(models, tmp_path):
    from safetensors.torch import load_file

    model, norm = models("clip, LoRA"), torch.nn.functional.layer_norm
    found = forms.export(model, "open_clip", tmp_path / "out")
    state = load_file(found.folder / "open_clip_model.safetensors")
    told = json.loads((found.folder / "open_clip_config.json").read_text())
    about, how = told["model_cfg"], told["preprocess_cfg"]
    texts, pictures = forms.drawn(model, PAIRS)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack(payloads(model, pictures)))
        mean, std = (torch.tensor(how[name])[:, None, None] for name in ("mean", "std"))
        patch, width = about["vision_cfg"]["patch_size"], about["vision_cfg"]["width"]
        x = (pixels / 255 - mean) / std
        x = torch.nn.functional.conv2d(x, state["visual.conv1.weight"], stride=patch)
        first = state["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x.flatten(2).mT], 1) + state["visual.positional_embedding"]
        x = norm(x, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
        heads = width // about["vision_cfg"]["head_width"]
        x = blocks(state, "visual.transformer", x, heads)[:, 0]
        x = norm(x, (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
        images = torch.nn.functional.normalize(x @ state["visual.proj"], dim=1)

        length = about["text_cfg"]["context_length"]
        ids, _ = model.vocabulary.encode(texts, length)
        ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = state["token_embedding.weight"][ids] + state["positional_embedding"]
        x = blocks(state, "transformer", x, about["text_cfg"]["heads"], mask)
        x = norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
        assert about["text_cfg"]["pool_type"] == "argmax"
        x = x[torch.arange(len(x)), ids.argmax(1)] @ state["text_projection"]
        found_texts = torch.nn.functional.normalize(x, dim=1)
    torch.testing.assert_close(found_texts, model.embed_texts(texts), atol=1e-5, rtol=0)
    expected = model.embed_payloads(payloads(model, pictures), 32)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_what_was_not_read_back_is_told(models, tmp_path, monkeypatch):
    """As where open_clip is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = forms.export(models("clip"), "open_clip", tmp_path / "out")
    assert found.unchecked == "open_clip is not installed here" and not found.differences
    with pytest.raises(InputError, match=r'needs onnx.*pip install "halftone-itr\[onnx\]"'):
        forms.export(models("clip"), "onnx", tmp_path / "other")
