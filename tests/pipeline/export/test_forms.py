"""Exports are read back by the library that each form is for, and give the model's own vectors."""

import json
import subprocess
import sys

import pytest
import torch

from bench import export as bench
from pipeline.errors import InputError
from pipeline.export import forms, graphs
from pipeline.export.adapters import merged
from pipeline.export.given import given
from pipeline.export.writing import BOTH

PAIRS = 100
WORKS = [
    ("clip", "hf", BOTH),
    ("clip", "hf", ("image",)),
    ("clip", "hf", ("text",)),
    ("clip", "sentence-transformers", BOTH),
    ("clip", "sentence-transformers", ("text",)),
    ("clip", "onnx", BOTH),
    ("clip", "torch", BOTH),
    ("clip, LoRA", "hf", BOTH),
    ("clip, LoRA", "onnx", BOTH),
    ("siglip", "hf", BOTH),
    ("siglip", "hf", ("text",)),
    ("siglip", "sentence-transformers", BOTH),
    ("siglip", "onnx", BOTH),
    ("vit + bert", "hf", BOTH),
    ("vit + bert", "sentence-transformers", BOTH),
    ("vit + bert", "onnx", BOTH),
    ("bert, regions", "sentence-transformers", ("text",)),
    ("bert, regions", "onnx", BOTH),
    ("pixels, gru", "onnx", BOTH),
    ("pixels, gru", "torch", BOTH),
    ("regions, bigru, gpo", "onnx", BOTH),
    ("regions, bigru, gpo", "torch", BOTH),
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


def test_an_export_that_gives_other_vectors_is_refused(models, tmp_path, monkeypatch):
    model = models("clip")

    def other(model):
        exported = whole(model)
        exported.visual_projection.weight.data.mul_(-1)
        return exported

    from pipeline.export import hugging_face

    whole = hugging_face.whole
    monkeypatch.setattr(hugging_face, "whole", other)
    with pytest.raises(InputError, match="the exported image tower differ.*not to be used"):
        forms.export(model, "hf", tmp_path / "out")


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
    forms.export(model, "torch", tmp_path / "out")
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
