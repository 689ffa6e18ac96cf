"""halftone export, and the card of what it writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from jobs.cli.main import main
from pipeline.reports.model_card import licence_of
from pipeline.storage import store
from pipeline.training.saved_model import load_model


def exported(capsys, *words: str) -> dict:
    main("export", [*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_trained_model_is_exported_with_its_card(finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    words = [f"{finished_run}:main", "--to", "torch", "--output", str(out)]
    told = exported(capsys, *words)
    assert told["differences"].keys() == {"image", "text"}
    assert max(told["differences"].values()) <= 1e-5 and told["unchecked"] is None
    there = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert set(told["files"]) == there and {"image.pt2", "text.pt2", "vocabulary.json"} <= there
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "pytorch" and "license" not in front
    metrics = json.loads(Path(finished_run, "6-rankings/main/metrics.json").read_text())
    assert f"| rsum | {metrics['metrics']['rsum']:.1f} |" in card
    assert (
        "ties: expected rank" in card and "- data version: " in card and "- label version" in card
    )
    assert "trained from scratch" in card


def test_a_model_that_was_evaluated_with_prompts_is_exported_without(
    finished_run, tmp_path, capsys
):
    """They say how texts are read and are no weights: an export reads texts as they are."""
    folder = tmp_path / "prompted"
    shutil.copytree(f"{finished_run}/5-model/main", folder)
    about = json.loads((folder / "index.json").read_text())
    about["pieces"][0]["recipe"]["evaluate"]["prompts"] = ["a photo of {}"]
    (folder / "index.json").write_text(json.dumps(about))
    assert load_model(str(folder)).prompts == ("a photo of {}",)
    words = [str(folder), "--to", "torch", "--tower", "text", "--output", str(tmp_path / "out")]
    assert exported(capsys, *words)["differences"]["text"] <= 1e-5


def test_a_checkpoint_is_exported_with_its_own_weights(finished_run, tmp_path, capsys):
    folder = f"{finished_run}/5-model/main/checkpoints"
    first, out = store.list_folders(folder)[0], tmp_path / "out"
    given = [f"{folder}/{first}", "--to", "torch", "--tower", "text", "--output", str(out)]
    assert exported(capsys, *given)["differences"].keys() == {"text"}
    assert not (out / "image.pt2").exists()


def test_what_mlflow_keeps_is_exported(finished_run, tmp_path, capsys):
    given = ["models:/drawn_tiny@main", "--root", finished_run, "--to", "torch", "--tower", "text"]
    exported(capsys, *given, "--output", str(tmp_path / "out"))
    program = torch.export.load(tmp_path / "out" / "text.pt2").module()
    model = load_model(f"{finished_run}/5-model/main")
    longest = model.recipe.model.max_words
    words, lengths = model.vocabulary.encode(["a red circle"], longest)
    padded = torch.nn.functional.pad(words, (0, longest - words.shape[1]))
    expected = model.embed_texts(["a red circle"])
    torch.testing.assert_close(program(padded, lengths), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs a model and --to"),
        (["ROOT", "--to", "hf"], "no class for the image tower 'pixels'"),
        (["ROOT:other", "--to", "onnx"], "no trained model 'other'"),
        (["models:/nobody@best", "--root", "ROOT", "--to", "onnx"], "has no model models:/nobody"),
    ],
)
def test_what_cannot_be_exported_is_refused(finished_run, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main("export", [word.replace("ROOT", finished_run) for word in words])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: mit\n---\n# A model\n", "mit"),
        ("README.md", "---\nlicense: other\nlicense_name: own-1\n---\n", "own-1"),
        ("config.json", '{"license": "apache-2.0"}', "apache-2.0"),
        ("LICENSE", "\n  MIT License\n\nCopyright …", "MIT License"),
        ("README.md", "# A model under the MIT licence, its page says\n", None),
        ("README.md", "---\nlicense: [torn\n---\n", None),
    ],
)
def test_a_licence_is_what_the_bases_own_files_state(tmp_path, file, text, licence):
    (tmp_path / file).write_text(text)
    assert licence_of(str(tmp_path)) == licence
    assert licence_of(str(tmp_path / "nowhere")) is None
