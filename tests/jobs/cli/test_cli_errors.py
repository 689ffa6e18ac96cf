"""Bad input at the command line: one clear sentence, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipeline.errors import InputError
from pipeline.labels import embed, label
from pipeline.reranking import rerank
from pipeline.storage import store
from pipeline.training import train
from schemas.settings import Recipe
from tests.helpers.stages import SCENES, finish, make_here, sharded

STAGES = ("ingest", "shard", "embed", "label", "train", "evaluate", "rerank", "search")
SMALL = [word for key, value in SCENES.items() for word in (f"--source.{key}", str(value))]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, on its own machine: pieces are made here, nothing is tracked."""
    monkeypatch.chdir(tmp_path)
    make_here(monkeypatch)
    monkeypatch.setattr("jobs.cli.run.Tracker", lambda *names: MagicMock())
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """A function that runs a command which must end with code 2; the sentence it ends with."""

    def run(command: str | None, *argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main(command, list(argv))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert "Traceback" not in printed.err
        return printed.err.strip().splitlines()[-1]

    return run


def files(folder) -> dict[Path, int]:
    """Modification time of every file."""
    return {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def recipe(tiny_encoder) -> Recipe:
    return Recipe(name="t", source=SCENES, shard={"samples": 8}, embed={"encoder": tiny_encoder})


@pytest.fixture(scope="module")
def four_stages(recipe, tmp_path_factory) -> str:
    """A run folder that has gone through four stages."""
    root = str(tmp_path_factory.mktemp("four"))
    sharded(recipe, root)
    finish(embed.plan(recipe, root), embed.write_embeddings)
    finish(label.plan(recipe, root), label.write_relevance)
    return root


@pytest.fixture
def half_way(here, recipe, four_stages) -> tuple[str, list[str]]:
    """A copy of it, and the options it was made with."""
    root = str(here / "run")
    shutil.copytree(four_stages, root)
    return root, [*SMALL, "--shard.samples", "8", "--encoder", recipe.embed.encoder, "--root", root]


# ---- words that do not exist -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["lable"], "halftone lable: unknown command 'lable'; did you mean 'label'?"),
        (["xyz"], "halftone xyz: unknown command 'xyz'; known: run, ingest, shard, "),
        (["label", "--rot", "x"], "unknown option --rot; did you mean '--root'?"),
        (["embed", "--embed.encodr", "x"], "did you mean '--embed.encoder'?"),
        (["train", "--batchsize", "3"], "did you mean '--batch-size'?"),
        (["run", "--recipe", "drwan"], "unknown recipe 'drwan'; did you mean 'drawn'?"),
        (["run", "--recipe", "gone.yaml"], "no recipe file gone.yaml; `halftone recipes` lists"),
        (["info", "--recipe", "drwan"], "did you mean 'drawn'?"),
        (["ingest", "--source.kind", "karpaty"], "source.kind 'karpaty'; did you mean 'karpathy'?"),
        (["train", "--train.losses.infonce.weight", "1"], "did you mean 'info_nce'?"),
        (
            ["label", "--label.map", "clap"],
            "label.map: Input should be 'half', 'clip', 'logistic' or 'isotonic'",
        ),
        (["label", "--recipe"], "expected one argument"),
    ],
)
def test_an_unknown_word_is_answered_with_a_near_one(refused, here, argv, sentence):
    assert sentence in refused(None, *argv)
    assert files(here) == {}


@pytest.mark.parametrize("text", ["train: {lr: {", "- a list", "trian: {lr: 1}"])
def test_a_recipe_file_that_is_wrong_is_named_or_its_key_is(refused, here, text):
    (here / "mine.yaml").write_text(text)
    sentence = refused("run", "--recipe", "mine.yaml")
    assert "mine.yaml" in sentence or "unknown setting 'trian'; did you mean 'train'?" in sentence


def test_a_batch_that_does_not_divide_into_lanes_is_told_what_would(refused):
    assert "choose a multiple of 8" in refused("train", "--batch-size", "100")


# ---- input that is not there -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("karpathy", "a.json"), ("csv", "a.csv"), ("flickr_tokens", "a.token"), ("precomp", "a/b")],
)
def test_a_source_that_is_not_there_is_named(refused, here, kind, name):
    sentence = refused("ingest", "--source.kind", kind, "--source.path", name)
    assert str(here / name) in sentence
    assert files(here) == {}


def test_a_source_without_a_path_is_told_what_it_reads(refused):
    assert "source.path is not given" in refused("ingest", "--recipe", "flickr8k")


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("shard", "ingest"),
        ("embed", "shard"),
        ("label", "embed"),
        ("train", "shard"),
        ("evaluate", "shard"),
        ("rerank", "evaluate"),
        ("search", "evaluate"),
        ("report", "evaluate"),
    ],
)
def test_a_stage_before_its_input_names_the_stage_to_run(refused, here, stage, first):
    sentence = refused(stage, "--recipe", "drawn_tiny", "--root", "nowhere")
    assert sentence.startswith(f"halftone {stage}: ")
    assert f"run `halftone {first}` first" in sentence and str(here / "nowhere") in sentence
    assert files(here) == {}


@pytest.mark.parametrize(
    ("stage", "first"),
    [("evaluate", "train"), ("rerank", "evaluate"), ("search", "evaluate"), ("report", "evaluate")],
)
def test_half_way_a_stage_names_the_one_that_is_missing(refused, half_way, stage, first):
    root, options = half_way
    before = files(root)
    assert f"run `halftone {first}` first" in refused(stage, "--recipe", "drawn_tiny", *options)
    assert files(root) == before


def test_a_graded_loss_names_the_embeddings_it_needs_and_another_loss_needs_none(here, recipe):
    root = str(here / "run")
    sharded(recipe, root)
    graded = {"train": recipe.train.model_copy(update={"losses": {"smooth_ndcg": {}}})}
    with pytest.raises(InputError, match="run `halftone embed` first"):
        train.plan(recipe.model_copy(update=graded), root, "main")
    assert train.plan(recipe, root, "main").pending


def test_info_on_a_folder_without_a_run_says_how_to_fill_it(refused, here):
    sentence = refused("info", "--root", "nowhere")
    assert "holds no stage of a run" in sentence and "halftone run --root" in sentence
    assert files(here) == {}


# ---- input that cannot be used -----------------------------------------------------------------


def test_an_empty_data_set_stops_ingest_and_what_comes_after(refused, here):
    nothing = [f"--source.{split}_images=0" for split in ("train", "val", "test")]
    assert "drawn holds no image" in refused("ingest", *nothing, "--root", "run")
    assert "run `halftone ingest` first" in refused("shard", *nothing, "--root", "run")


def test_an_image_that_is_there_twice_stops_ingest_and_what_comes_after(refused, here):
    Image.new("RGB", (24, 24)).save(here / "a.jpg")
    for name in ("1.csv", "2.csv"):
        (here / name).write_text("image,caption\na.jpg,a dog\n")
    source = ["--source.kind", "csv", "--source.path", "*.csv", "--root", "run"]
    assert "1 image ids appear more than once, the first is 'a'" in refused("ingest", *source)
    assert "run `halftone ingest` first" in refused("shard", *source)


@pytest.fixture
def pictures(here) -> list[str]:
    """The options of a data set of 21 pictures, one of them truncated."""
    rng = np.random.default_rng(0)
    for number in range(21):
        noise = rng.integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(noise).save(here / f"{number}.jpg")
    (here / "20.jpg").write_bytes((here / "20.jpg").read_bytes()[:600])
    rows = "".join(f"{number}.jpg,picture {number}\n" for number in range(21))
    (here / "data.csv").write_text("image,caption\n" + rows)
    return ["--source.kind", "csv", "--source.path", "data.csv", "--root", "run"]


def test_a_truncated_image_is_set_aside_and_counted(pictures, here, capsys):
    main.main("ingest", pictures)
    capsys.readouterr()
    main.main("shard", [*pictures, "--json"])
    printed = capsys.readouterr()
    results = json.loads(printed.out)["models"]
    shown = list(results.values())[-1]["shard"]
    assert (shown["samples"], shown["rejected"]) == (20, 1)
    assert shown["rejected: image does not decode"] == 1
    assert "rejected 1" in printed.err


def test_too_many_bad_images_stop_the_stage_and_what_comes_after(refused, pictures):
    main.main("ingest", pictures)
    options = [*pictures, "--shard.failure_budget", "0.01"]
    sentence = refused("shard", *options)
    assert "1 of 21 samples were rejected (1 × image does not decode)" in sentence
    assert "run `halftone shard` first" in refused("embed", *options)


def test_region_towers_on_shards_of_images_are_refused_and_the_other_way_round(half_way, recipe):
    root, _ = half_way
    for image, sentence in (
        ("regions", "needs feature shards, these hold images; use 'pixels'"),
        ("regiosn", "unknown model.image 'regiosn'"),
    ):
        changed = {"model": recipe.model.model_copy(update={"image": image})}
        small = {"train": recipe.train.model_copy(update={"batch_size": 8})}
        plan = train.plan(recipe.model_copy(update=changed | small), root, "main")
        with pytest.raises(InputError, match=sentence):
            train.fit(plan.pieces[0], lambda records: None)


def test_pixel_towers_on_shards_of_features_are_refused(here):
    np.save(here / "train_ims.npy", np.ones((8, 3, 5), np.float32))
    (here / "train_caps.txt").write_text("a caption\n" * 8)
    source = {"kind": "precomp", "path": str(here)}
    recipe = Recipe(name="t", source=source, train={"batch_size": 8})
    sharded(recipe, here)
    plan = train.plan(recipe, str(here), "main")
    with pytest.raises(InputError, match="needs image shards, these hold features; use 'regions'"):
        train.fit(plan.pieces[0], lambda records: None)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({"infonce": {}}, "unknown loss 'infonce' in train.losses; did you mean 'info_nce'?"),
        ({"info_nce": {"temprature": 0.1}}, "temprature"),
        ({"info_nce": {"weight": "five"}}, "train.losses.info_nce: the weight must be a number"),
        ({"info_nce": {"temperature": 0}}, "train.losses.info_nce: temperature must be above 0"),
        ({"triplet": {"weight": {"from": 0, "to": 1}}}, "train.losses.triplet: a schedule is"),
        ({"triplet": {"margin": {"from": 0, "to": 1, "steps": 9}}}, "a schedule is .* got .*steps"),
        (
            {"smooth_ndcg": {"tau": {"from": 0.1, "to": 0, "over": 3}}},
            "train.losses.smooth_ndcg: tau and error must be above 0",
        ),
        ({"kendall_rank": {"window": {"from": 16, "to": 4, "over": 3}}}, "are whole numbers"),
        ({"kendall_rank": {"average": "pairs"}}, "average is 'pairs'.*use 'queries'"),
        ({"triplet": {"negatives": "hard"}}, "hard"),
        ({}, "train.losses is empty; choose from"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_before_any_work(half_way, recipe, losses, sentence):
    root, _ = half_way
    changed = {"train": recipe.train.model_copy(update={"losses": losses})}
    with pytest.raises(InputError, match=sentence):
        train.plan(recipe.model_copy(update=changed), root, "main")


def test_a_split_too_small_for_a_batch_is_told_the_option_to_lower(half_way, recipe):
    root, _ = half_way
    plan = train.plan(recipe, root, "main")
    with pytest.raises(InputError, match="12 train images do not fill .* 128; lower --train.batch"):
        train.fit(plan.pieces[0], lambda records: None)


@pytest.fixture
def evaluated(half_way) -> tuple[str, list[str]]:
    """A run folder whose indexes say that a model was trained and evaluated on test."""
    root, options = half_way
    pieces = [
        {"name": f"{split}-000000", "split": split, "files": {}, "images": 1, "captions": 1}
        for split in ("train", "val", "test")
    ]
    for folder in ("5-model/main", "6-rankings/main/vectors"):
        index = {"version": "v", "pieces": pieces}
        store.write_json(f"{root}/{folder}/index.json", index)
    return root, [*options, "--recipe", "drawn_tiny"]


@pytest.mark.parametrize("argv", [["evaluate"], ["search"], ["search", "a dog"]])
def test_an_unknown_split_is_named(refused, evaluated, argv):
    _, options = evaluated
    assert "'tset'" in refused(*argv, *options, "--evaluate.split", "tset")


def test_re_ranking_an_unknown_split_is_refused_before_any_work(evaluated, recipe):
    root, _ = evaluated
    changed = {"evaluate": recipe.evaluate.model_copy(update={"split": "tset"})}
    with pytest.raises(InputError, match="'tset'"):
        rerank.plan(recipe.model_copy(update=changed), root, "main")


def test_a_run_folder_that_is_a_file_is_named(refused, here):
    (here / "taken").write_text("")
    assert "taken" in refused("ingest", *SMALL, "--root", "taken")


# ---- dry runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", *STAGES, "report"])
def test_a_dry_run_on_nothing_writes_nothing(here, command):
    main.main(command, ["--recipe", "drawn_tiny", "--root", "run", "--dry-run"])
    assert files(here) == {}


@pytest.mark.parametrize("command", ["run", *STAGES, "report"])
def test_a_dry_run_half_way_writes_nothing_and_changes_nothing(half_way, command):
    root, options = half_way
    before = files(root)
    main.main(command, ["--recipe", "drawn_tiny", *options, "--dry-run"])
    assert files(root) == before


def test_a_dry_run_says_what_would_be_made_and_what_is_there(half_way, capsys):
    _, options = half_way
    main.main("run", ["--recipe", "drawn_tiny", *options, "--label.map", "half", "--dry-run"])
    lines = capsys.readouterr().err.splitlines()
    said = {stage: line for line in lines for stage in STAGES if line[2:].startswith(stage)}
    assert "nothing to do, 3 done" in said["ingest"]
    assert "nothing to do, 4 done" in said["shard"]
    assert "4 to make (train-000000, train-000001, val-000000, … 1 more), 0 done" in said["label"]
    assert set(said) == set(STAGES)
