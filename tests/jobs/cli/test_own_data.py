"""`halftone run PATH`: what is found at a path, and what is chosen to fit it."""

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.cli import main, options, own_data
from jobs.cli.command import command_of
from jobs.cli.scopes import models_of
from pipeline.errors import InputError
from pipeline.models.backbones import packaged
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import Recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder(path, count: int, split: str = "") -> None:
    """Pictures with two captions each."""
    where = path / split
    where.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(where / f"{n}.jpg")
        (where / f"{n}.txt").write_text(f"a dog number {n}\na brown dog\n")


def chosen(*argv: str) -> Recipe:
    """The settings of a dry run."""
    given, overrides = options.parse("run", command_of("run"), list(argv))
    own_data.choose(given, overrides)
    ((_, recipe),) = models_of(given, overrides)[1]
    return recipe


def test_a_folder_of_pictures_is_enough(here, capsys):
    folder(here / "my pets", 60)
    recipe = chosen("my pets")
    assert (recipe.name, recipe.source.kind) == ("my-pets", "folder")
    assert (recipe.source.cut_val, recipe.source.cut_test) == (0.1, 0.1)
    assert recipe.evaluate.split == "test" and recipe.model.image == "efficientnet"
    assert recipe.train.batch_size == 8 and recipe.train.epochs == own_data.EPOCHS[1]
    assert recipe.embed.encoder == own_data.ENCODER and recipe.label.map == "logistic"
    said = capsys.readouterr().err
    assert "60 images, 120 captions (train 60)" in said
    assert "cut 10 % val and 10 % test off train" in said and "one split" not in said
    main.main("run", ["my pets", "--dry-run"])
    assert not (here / "runs").exists()


def test_without_packaged_encoders_towers_start_from_scratch(here, monkeypatch, capsys):
    folder(here / "data", 60)
    monkeypatch.setattr(packaged, "file_of", lambda name: None)
    recipe = chosen("data")
    assert (recipe.model.image, recipe.model.text) == ("pixels", "gru")
    assert recipe.embed.encoder == "tfidf" and "from scratch" in capsys.readouterr().err


def test_splits_that_are_there_are_kept_and_what_is_typed_wins(here):
    for split, count in (("train", 60), ("val", 5)):
        folder(here / "data", count, split)
    typed = ("--train.epochs", "3", "--source.cut_test", "0.2", "--embed.encoder", "x")
    recipe = chosen("data", *typed)
    assert (recipe.source.cut_val, recipe.source.cut_test) == (0.0, 0.2)
    assert recipe.train.epochs == 3 and recipe.embed.encoder == "x"
    assert recipe.evaluate.split == "test"


def test_few_pictures_are_not_cut(here, capsys):
    folder(here / "few", 9)
    assert chosen("few").source.cut_test == 0
    assert "too few to measure anything by" in capsys.readouterr().err


def test_a_table_of_features_or_with_a_recipe(here):
    np.save(here / "train_ims.npy", np.ones((60, 36, 8), np.float32))
    (here / "train_caps.txt").write_text("".join(f"a caption {n}\n" for n in range(300)))
    recipe = chosen(str(here))
    assert recipe.source.kind == "precomp" and recipe.model.image == "regions"
    assert recipe.shard.resize == "keep"
    named = chosen(str(here), "--recipe", "flickr8k_regions", "--name", "info_nce")
    assert named.source.path == str(here) and named.train.batch_size == 128


def test_test_alone_is_refused_with_what_to_do(here):
    folder(here / "data", 3, "test")
    with pytest.raises(InputError, match="no train images, only test 3.*source.splits.test train"):
        chosen("data")


def test_a_pretrained_model_is_the_towers(here):
    folder(here / "data", 60)
    model = chosen("data", "--model.pretrained", "some/clip").model
    assert (model.image, model.text, model.pretrained) == ("pretrained", "pretrained", "some/clip")
    assert model.image_size is None and model.max_words is None  # its own


def test_a_setting_inside_a_setting_is_not_taken_for_the_data(here):
    folder(here / "data", 60)
    for argv in (
        ["--train.losses.smooth_ndcg.tau", "0.5", "data"],
        ["data", "--train.losses.smooth_ndcg.tau=0.5"],
    ):
        given, overrides = options.parse("run", command_of("run"), argv)
        assert given.source == "data"
        assert overrides == {"train": {"losses.smooth_ndcg.tau": 0.5}}
    given, overrides = options.parse("run", command_of("run"), argv[1:])
    assert given.source is None and overrides["train"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/my products.csv.gz", "my-products"),
        ("tars/{00000..00009}.tar", "tars"),
        ("s3://bucket/data/*.csv", "data"),
        ("hf://someone/things", "things"),
        ("*.csv", "own"),
    ],
)
def test_a_run_is_called_after_its_data(path, name):
    assert own_data.called(path) == name


def test_a_submitted_job_has_a_run_folder_that_outlives_it(here, monkeypatch):
    """Its working directory ends with it, so that `runs` there is no place."""
    folder(here / "data", 60)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(here / "home"))
    given, overrides = options.parse("run", command_of("run"), [str(here / "data")])
    own_data.choose(given, overrides)
    assert models_of(given, overrides)[0] == str(here / "home" / "halftone" / "runs" / "data")


def test_the_second_command_keeps_the_settings_of_the_first(here):
    folder(here / "data", 60)
    run = RunFolder(str(here / "runs" / "data"))
    recipe = chosen("data", "--train.epochs", "7")
    settings = yaml.safe_dump(recipe.model_dump(mode="json")).encode()
    store.write_bytes(run.settings_uri("main"), settings)
    folder(here / "data" / "more", 600)
    again = chosen("data")
    assert again == recipe
