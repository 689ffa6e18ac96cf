"""The recipes that tune a pretrained model, against random ones made on the spot."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from jobs.cli.main import main
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from tests.helpers.paths import ROOT
from tests.helpers.stages import make_here
from tests.pipeline.models.test_pretrained import TEXT, VISION, save

RECIPES = sorted(
    file.stem
    for file in (ROOT / "recipes").glob("*.yaml")
    if yaml.safe_load(file.read_text()).get("model", {}).get("image") == "pretrained"
)
BEFORE = "clip0.before-training"  # after the folder of `models`
COUNTS = {"train": 40, "val": 12, "test": 12}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a random CLIP and a random SigLIP, smaller than those of the recipes."""
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    clip = save(tmp_path_factory.mktemp("models") / "clip0", CLIPModel(config))
    config = SiglipConfig(text_config=TEXT, vision_config=VISION)
    folder = tmp_path_factory.mktemp("others") / "siglip0"
    return {"clip": clip, "siglip": save(folder, SiglipModel(config))}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[str]:
    """Options of a data set as Karpathy's JSON has it, of odd shapes and two captions a picture."""
    folder, images = tmp_path_factory.mktemp("karpathy"), []
    for split, count in COUNTS.items():
        for number in range(count):
            name, size = f"{split}{number}.jpg", (40 + number % 3 * 20, 60)
            picture(folder / name, size, number)
            texts = [f"a {c} circle on {p}" for c in ("red", "blue") for p in ("sand", "grass")]
            some = [texts[(number + k) % 4] for k in range(2)]
            sentences = [{"raw": f"{text} {number}"} for text in some]
            images.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    path = str(folder / "dataset.json")
    return ["--source.path", path, "--source.images", str(folder), "--shard.samples", "16"]


def picture(path: Path, size: tuple[int, int], seed: int) -> None:
    from PIL import Image

    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=noise, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize(size).save(path)


@pytest.fixture(scope="module")
def command(tmp_path_factory, models, source, tiny_encoder):
    """A run folder with the data's stages, and what a recipe's command has besides its name."""
    root = str(tmp_path_factory.mktemp("runs") / "run")
    same = [*source, "--root", root, "--encoder", tiny_encoder, "--label.map", "clip"]
    with pytest.MonkeyPatch.context() as patch:
        make_here(patch)
        for stage in ("ingest", "shard", "embed", "label"):
            main(stage, ["--recipe", RECIPES[0], "--name", "tuned", *same])

    def words(recipe: str, name: str) -> list[str]:
        model = models["siglip" if "siglip" in recipe else "clip"]
        small = ["--model.pretrained", model, "--model.image_size", "48", "--batch-size", "8"]
        return ["--recipe", recipe, "--name", name, *same, *small, "--precision", "fp32"]

    return root, words


def train_here(monkeypatch) -> None:
    """From now on a command trains in this process."""

    def train(fit, piece, settings, record, *others):
        fit(piece, record)

    monkeypatch.setattr("jobs.cluster.training.train", train)


@pytest.fixture
def here(monkeypatch):
    make_here(monkeypatch)
    train_here(monkeypatch)


def test_there_are_those_of_the_field():
    assert [
        *("coco_clip", "coco_siglip", "flickr30k_clip", "flickr30k_lit", "flickr30k_lora"),
        "flickr8k_clip",
    ] == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_tells_steps_time_and_memory(command, here, capsys, recipe):
    root, words = command
    capsys.readouterr()
    main("run", [*words(recipe, f"dry-{recipe}"), "--dry-run", "--json"])
    said = capsys.readouterr()
    results = json.loads(said.out.strip().splitlines()[-1])["models"][f"dry-{recipe}"]
    found = results["forecast"]
    settings = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["train"]
    assert (
        found["steps"] == settings["epochs"] * found["steps_per_epoch"] == 10 * settings["epochs"]
    )
    assert found["taken"] == 10 and 0 < found["trained"] <= found["parameters"]
    assert found["state_bytes"] >= 4 * found["parameters"] + 12 * found["trained"]
    told = " ".join(said.err.split())
    assert re.search(r"min an epoch, \d+ min in all .* GB of weights, gradients", told)
    before = BEFORE.replace("clip", "siglip") if "siglip" in recipe else BEFORE
    assert f"model {before}" in said.err
    assert not store.exists(RunFolder(root).folder("train", f"dry-{recipe}"))


def test_every_setting_of_training_has_its_reason():
    reasoned = ("epochs", "batch_size", "chunk", "lr", "lr_warmup", "betas", "weight_decay", "crop")
    for recipe in RECIPES:
        text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
        first = recipe == "flickr8k_clip"
        for name in reasoned if first else ("epochs", "lr"):
            assert re.search(rf"^  {name}: .*# \w", text, re.M), (recipe, name)


@pytest.fixture(scope="module")
def run(command):
    """A recipe run through, with the row before training in everything that it leaves."""
    root, words = command
    with pytest.MonkeyPatch.context() as patch:
        make_here(patch)
        train_here(patch)
        main("run", [*words("flickr30k_clip", "tuned"), "--epochs", "1", "--lr", "1e-3"])
    return root


def test_the_row_before_training_stands_in_every_table(run, capsys):
    for name in (BEFORE, "tuned"):
        found = store.read_json(f"{run}/6-rankings/{name}/metrics.json")
        assert found["metrics"]["rsum"] > 0
    page = store.read_text(f"{run}/report.html")
    assert page.count('"first">') > 2 and BEFORE in page
    assert "before training and the trained ones" in page  # the curve
    assert re.search(r"epoch 1, α [\d.]+", page) and "as it came" in page
    capsys.readouterr()
    main("report", ["--root", run])
    assert f" {BEFORE}" in capsys.readouterr().out
    main("compare", [f"{run}:{BEFORE}", f"{run}:tuned", "--json"])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(found) == ["run:tuned"] and found["run:tuned"]["against"] == f"run:{BEFORE}"


def test_mlflow_has_the_row_and_the_curve(run):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path(run).parent}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    every = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}
    names = {r.info.run_name for r in every.values()}
    assert {BEFORE, "tuned"} <= names
    stages = {
        (every[r.data.tags["mlflow.parentRunId"]].info.run_name, r.info.run_name): r
        for r in every.values()
        if "mlflow.parentRunId" in r.data.tags
    }
    trained, before = stages["tuned", "train"], stages[BEFORE, "train"]
    curve = client.get_metric_history(trained.info.run_id, "interpolation/rsum")
    assert sorted(point.step for point in curve) == [*range(0, 101, 10)]
    entry = store.read_json(f"{run}/5-model/tuned/index.json")["pieces"][0]
    assert trained.data.metrics["alpha"] == entry["alpha"]
    assert trained.data.metrics["val_rsum_over_zero_shot"] >= 0
    history = client.get_metric_history(trained.info.run_id, "val/rsum")
    assert {point.step for point in history} == {0, 10}
    assert before.data.metrics["val/rsum"] == next(p.value for p in history if p.step == 0)


def evaluated(root: str, *words: str) -> None:
    main("evaluate", ["--root", root, *words])


def test_a_model_that_was_never_trained_here_is_evaluated(run, here, models, capsys):
    evaluated(run, "--pretrained", models["clip"], "--name", "zero")
    own, before = (
        store.read_json(f"{run}/6-rankings/{name}/metrics.json") for name in ("zero", BEFORE)
    )
    assert own["metrics"] == before["metrics"]
    evaluated(run, "--pretrained", models["siglip"])
    name = store.name_of(models["siglip"])
    assert store.exists(f"{run}/6-rankings/{name}/metrics.json")
    prompts = '["a photo of {}", "{} and a star"]'
    evaluated(run, "--pretrained", models["clip"], "--name", "asked", "--evaluate.prompts", prompts)
    asked = store.read_json(f"{run}/6-rankings/asked/metrics.json")
    assert asked["protocol"]["prompts"] == json.loads(prompts)
    assert asked["metrics"] != own["metrics"]
    capsys.readouterr()
    main("report", ["--root", run])
    out = capsys.readouterr().out
    assert all(f" {label} " in out for label in ("zero", "asked", BEFORE, "tuned"))
    main("search", ["red circle", "--root", run, "--name", "asked", "--search.shades", "false"])


def test_what_others_are_trained_with_leaves_it_as_it_is(run, here, models, capsys):
    evaluated(run, "--pretrained", models["clip"], "--name", "zero")
    zero = store.read_json(f"{run}/6-rankings/zero/metrics.json")
    assert "prompts" not in zero["protocol"]  # as another model of no steps has
    before = store.read_bytes(f"{run}/5-model/zero/history.json")
    capsys.readouterr()
    main("train", ["--root", run, "--epochs", "2", "--lr", "1e-3"])
    assert store.read_bytes(f"{run}/5-model/zero/history.json") == before
    records = store.read_json(f"{run}/5-model/tuned/history.json")["records"]
    assert max(record.get("epoch", 0) for record in records) == 2


def test_the_row_can_be_left_out(command, here, capsys):
    _, words = command
    capsys.readouterr()
    main("run", [*words("coco_clip", "alone"), "--dry-run", "--evaluate.before_training", "false"])
    assert BEFORE not in capsys.readouterr().err


def test_a_trained_model_is_not_replaced(run, models, capsys):
    with pytest.raises(SystemExit):
        main("evaluate", ["--root", run, "--pretrained", models["clip"], "--name", "tuned"])
    assert "tuned is a trained model of" in capsys.readouterr().err


def test_a_model_of_texts_alone_is_no_zero_shot_model(run, capsys, tmp_path):
    from transformers import BertConfig, BertModel

    save(
        tmp_path, BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    )
    with pytest.raises(SystemExit):
        main("evaluate", ["--root", run, "--pretrained", str(tmp_path)])
    assert f"model.pretrained '{tmp_path}' takes no images" in capsys.readouterr().err
