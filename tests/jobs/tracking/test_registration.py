"""Trained models become versions; aliases end right whenever and in whatever order they come."""

import shutil
from pathlib import Path

import pytest

from jobs.tracking.waiting import FILE
from pipeline.storage import store
from tests.helpers.mlflow_server import client_of, runs_of


@pytest.fixture
def model(finished_run, tmp_path):
    """A trained model's folder; asked again, another model lies there."""
    folder = tmp_path / "5-model"
    shutil.copytree(f"{finished_run}/5-model/main", folder)
    made = iter(range(100))

    def train() -> str:
        index = store.read_json(f"{folder}/index.json")
        store.write_json(f"{folder}/index.json", {**index, "version": f"version {next(made)}"})
        return str(folder)

    return train


def trained(tracker, fingerprint: str, folder: str, score: float):
    tracker.begin("train", {"0": fingerprint})
    tracker.log("train", metrics={"val/rsum": score})
    tracker.model("train", folder, score)
    tracker.end("train")
    tracker.finish()


def aliases(uri: str, name: str = "recipe") -> dict[str, float]:
    """The scores of the versions that a model's aliases name."""
    client = client_of(uri)
    named = client.get_registered_model(name).aliases
    return {a: float(client.get_model_version(name, v).tags["val_rsum"]) for a, v in named.items()}


def test_a_model_is_its_name_s_newest_and_the_best_is_the_best(database, tracker, model):
    trained(tracker(), "f1", model(), 100.0)
    assert aliases(database) == {"main": 100.0, "best": 100.0}
    trained(tracker("rival"), "f2", model(), 200.0)
    assert aliases(database) == {"main": 100.0, "rival": 200.0, "best": 200.0}
    trained(tracker(), "f3", model(), 50.0)
    assert aliases(database) == {"main": 50.0, "rival": 200.0, "best": 200.0}
    trained(tracker("unscored"), "f4", model(), float("nan"))
    assert aliases(database)["best"] == 200.0


def test_a_training_that_ended_while_the_server_was_away_is_made_up_for(
    database, tracker, model, monkeypatch
):
    trained(tracker(), "f1", model(), 50.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    trained(tracker(), "f2", model(), 100.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert aliases(database) == {"main": 50.0, "best": 50.0}
    tracker().finish()
    assert aliases(database) == {"main": 100.0, "best": 100.0}
    client = client_of(database)
    version = client.get_model_version_by_alias("recipe", "main")
    newest = next(r for r in runs_of(database) if r.info.run_name == "train")
    assert version.run_id == newest.info.run_id and newest.info.status == "FINISHED"
    assert len(newest.outputs.model_outputs) == 1
    tracker().finish()
    assert len(client.search_model_versions("name='recipe'")) == 2


def test_an_older_and_worse_one_that_comes_late_takes_no_alias(
    database, tracker, model, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    trained(tracker(folder="late"), "f1", model(), 50.0)
    folder = shutil.copytree(model(), Path(model()).with_name("other"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    trained(tracker(folder="early"), "f2", str(folder), 100.0)
    store.write_json(  # as the first training left it
        f"{Path(folder).with_name('5-model')}/index.json",
        {**store.read_json(f"{folder}/index.json"), "version": "version 0"},
    )
    tracker(folder="late").finish()
    assert len(client_of(database).search_model_versions("name='recipe'")) == 2
    assert aliases(database) == {"main": 100.0, "best": 100.0}


def test_a_model_that_was_made_anew_before_it_was_registered_is_not(
    database, tracker, model, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    trained(tracker(), "f1", model(), 50.0)
    model()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    tracker().finish()
    assert client_of(database).search_model_versions("name='recipe'") == []
    assert "another one lies in" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["team/flickr: v2", "l'image", "..", "x" * 600])
def test_any_recipe_s_name_is_registered(database, tracker, model, recipe):
    trained(tracker("a+b", experiment=recipe), "f1", model(), 50.0)
    (version,) = client_of(database).search_model_versions()
    assert aliases(database, version.name) == {"a-b": 50.0, "best": 50.0}
    assert not Path(tracker().root, FILE).exists()


def test_a_registration_that_broke_off_is_not_done_twice(database, tracker, model, monkeypatch):
    folder = model()
    with monkeypatch.context() as breaking:
        breaking.setattr(
            "mlflow.MlflowClient.create_model_version",
            lambda *a, **k: (_ for _ in ()).throw(ConnectionError("the line broke")),
        )
        trained(tracker(), "f1", folder, 50.0)
    (run,) = (r for r in runs_of(database) if r.info.run_name == "train")
    assert run.info.status == "FINISHED" and Path(tracker().root, FILE).exists()
    tracker().finish()
    (run,) = (r for r in runs_of(database) if r.info.run_name == "train")
    assert len(run.outputs.model_outputs) == 1 and run.info.status == "FINISHED"
    assert aliases(database) == {"main": 50.0, "best": 50.0}


def test_a_store_that_takes_no_files_leaves_the_model_out_and_says_so(
    database, tracker, model, tmp_path, capsys
):
    (tmp_path / "mlflow-artifacts").write_text("a file where the folder should be")
    trained(tracker(), "f1", model(), 50.0)
    said = capsys.readouterr().err
    assert said.count("cannot take the model") == 1 and "stays in" in said
    (run,) = (r for r in runs_of(database) if r.info.run_name == "train")
    assert run.info.status == "FINISHED" and run.data.metrics["val/rsum"] == 50.0
