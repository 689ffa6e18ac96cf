"""What a run leaves in MLflow, whatever happens to server, database, artifacts and run folder."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from jobs.tracking.waiting import FILE
from tests.helpers.mlflow_server import client_of, curve, runs_of


def train(tracker, fingerprint: str = "f", steps: int = 3, lr: float = 0.1, **metrics) -> None:
    """What a command says of one stage."""
    tracker.begin("train", {"0": fingerprint})
    tracker.log("", params={"train.lr": lr})
    tracker.log("train", params={"train.lr": lr})
    tracker.records("train", [{"step": s, "train/loss": lr / s} for s in range(1, steps + 1)])
    tracker.log("train", metrics=metrics)
    tracker.end("train")
    tracker.finish()


def pending(tracker) -> list:
    path = Path(tracker.root, FILE)
    return json.loads(path.read_text()) if path.exists() else []


def by_name(found: list) -> dict:
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


# ---- which run ---------------------------------------------------------------------------------


def test_other_settings_are_other_runs_and_the_same_again_are_the_same(database, tracker):
    train(tracker(), "f1", steps=4, lr=0.1, rsum=1.0)
    train(tracker(), "f1", steps=5, lr=0.1, rsum=1.0)
    train(tracker(), "f2", steps=2, lr=0.2, rsum=2.0)
    found = runs_of(database)
    assert [r.info.run_name for r in found] == ["train", "main", "train", "main"]
    new, parent, old, old_parent = found
    assert [r.data.params["train.lr"] for r in found] == ["0.2", "0.2", "0.1", "0.1"]
    assert curve(database, new, "train/loss") == [(1, 0.2), (2, 0.1)]
    assert [step for step, _ in curve(database, old, "train/loss")] == [1, 2, 3, 4, 5]
    assert curve(database, old, "rsum") == [(0, 1.0)]
    assert new.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert old.data.tags["mlflow.parentRunId"] == old_parent.info.run_id
    assert {r.info.status for r in found} == {"FINISHED"}


def test_what_changes_nothing_that_is_made_stays_in_its_run_and_is_told(database, tracker):
    train(tracker(), "f", lr=0.1)
    again = tracker()
    again.begin("train", {"0": "f", "1": "more"})
    again.log("train", params={"train.lr": 0.1, "train.workers": 2})
    again.log("train", params={"train.workers": 4})
    again.finish()
    stage = by_name(runs_of(database))["train"]
    assert stage.data.params == {"train.lr": "0.1", "train.workers": "2"}
    assert stage.data.tags["changed.train.workers"] == "4"


def test_a_command_that_was_killed_is_told_of_by_the_next(database, tracker):
    first = tracker()
    first.begin("train", {"0": "f"})
    first.log("train", params={"train.lr": 1})  # killed here
    assert tracker().unfinished("train", {"0": "f"})
    assert not tracker().unfinished("train", {"0": "another"})
    assert not tracker().unfinished("evaluate", {})
    train(tracker(), "f", lr=1)
    assert not tracker().unfinished("train", {"0": "f"})
    assert {r.info.status for r in runs_of(database)} == {"FINISHED"}


def test_a_command_that_was_killed_after_its_last_stage_is_ended_by_the_next(database, tracker):
    first = tracker()
    first.begin("train", {"0": "f"})
    first.log("", params={"a": 1})
    first.end("train")  # killed here
    tracker().finish()
    assert {r.info.status for r in runs_of(database)} == {"FINISHED"}


def test_a_run_that_was_broken_off_is_ended_by_the_one_that_takes_its_place(database, tracker):
    first = tracker()
    first.begin("train", {"0": "f1"})
    first.log("", params={"a": 1})
    first.log("train", params={"a": 1})
    train(tracker(), "f2")
    assert [r.info.status for r in runs_of(database)] == ["FINISHED"] * 2 + ["KILLED"] * 2


def test_a_stage_that_ended_keeps_its_status_when_a_later_one_fails(database, tracker):
    one = tracker()
    for stage in ("shard", "embed"):
        one.begin(stage, {"0": stage})
        one.log("", params={"a": 1})
        one.log(stage, params={"a": 1})
        if stage == "shard":
            one.end(stage)
    one.finish("KILLED")
    status = {name: r.info.status for name, r in by_name(runs_of(database)).items()}
    assert status == {"shard": "FINISHED", "embed": "KILLED", "main": "KILLED"}


def test_a_copy_of_a_folder_writes_to_runs_of_its_own(database, tracker, tmp_path, capsys):
    train(tracker(), rsum=1.0)
    before = {r.info.run_id: (r.data.metrics, r.info.end_time) for r in runs_of(database)}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for _ in range(2):
        train(tracker(folder="copy"), "f", rsum=2.0)
    found = runs_of(database)
    assert {r.info.run_id: (r.data.metrics, r.info.end_time) for r in found[2:]} == before
    assert len(found) == 4
    assert {r.data.tags["halftone.root"] for r in found[:2]} == {str(tmp_path / "copy")}
    assert f"knows {tmp_path / 'copy'} as {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_relative_uri_is_one_database_from_any_folder(
    empty_database, tracker, tmp_path, monkeypatch, capsys
):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        shutil.copy(empty_database, "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        train(tracker())
        assert len(runs_of(f"sqlite:///{tmp_path}/{folder}/mlflow.db")) == 2
    assert f"tracked at sqlite:///{tmp_path}/here/mlflow.db: new runs" in capsys.readouterr().err


# ---- what is lost on the server ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["run", "parent", "experiment", "database"])
def test_what_is_deleted_begins_anew_and_is_told(database, tracker, capsys, what):
    train(tracker(), rsum=1.0)
    deleted = by_name(runs_of(database))
    client = client_of(database)
    if what == "experiment":
        client.delete_experiment(deleted["main"].info.experiment_id)
    elif what == "database":
        os.remove(database.removeprefix("sqlite:///"))
    else:
        client.delete_run(deleted["main" if what == "parent" else "train"].info.run_id)
    again = tracker()
    train(again, lr=0.1, ndcg=2.0)
    found = by_name(runs_of(database))
    assert found["train"].data.metrics["ndcg"] == 2.0
    assert [step for step, _ in curve(database, found["train"], "train/loss")] == [1, 2, 3]
    assert found["train"].data.tags["mlflow.parentRunId"] == found["main"].info.run_id
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    said = capsys.readouterr().err
    assert "main/train" in said if what == "run" else "has no run main" in said
    assert ("goes to" in said or "'recipe-2'" in said) == (what == "experiment")
    assert not pending(again)


def test_a_run_that_is_deleted_meanwhile_is_written_again_whole(database, tracker):
    one = tracker()
    one.begin("train", {"0": "f"})
    one.log("", params={"a": 1}, metrics={"base/rsum": 3.0})
    one.log("train", params={"train.lr": 1}, metrics={"seconds": 2.0})
    one.artifact("", "settings.yaml", b"a: 1")
    client_of(database).delete_experiment(runs_of(database)[0].info.experiment_id)
    one.records("train", [{"step": 1, "train/loss": 1.0}])
    one.end("train")
    one.finish()
    found = by_name(runs_of(database))
    assert found["train"].data.metrics == {"seconds": 2.0, "train/loss": 1.0}
    assert found["train"].data.params == {"train.lr": "1"}
    assert found["main"].data.metrics == {"base/rsum": 3.0}
    files = client_of(database).list_artifacts(found["main"].info.run_id)
    assert [file.path for file in files] == ["settings.yaml"]


def test_a_database_that_is_replaced_meanwhile_gets_all_of_the_session(
    database, tracker, empty_database
):
    one = tracker()
    one.log("train", metrics={"a": 1.0})
    path = database.removeprefix("sqlite:///")
    os.remove(path)
    shutil.copy(empty_database, path)
    one.log("train", metrics={"b": 2.0})
    one.finish()
    assert by_name(runs_of(database))["train"].data.metrics == {"a": 1.0, "b": 2.0}


def test_a_ruined_database_is_told_and_another_one_gets_what_waits(database, tracker, capsys):
    path = Path(database.removeprefix("sqlite:///"))
    path.write_bytes(b"ruined" * 5000)
    one = tracker()
    train(one, rsum=1.0)
    said = capsys.readouterr().err
    assert said.count("not a database") == 1 and str(path) in said and "until then" in said
    assert "is written by the next run" not in said
    path.unlink()
    tracker().finish()
    found = by_name(runs_of(database))
    assert found["train"].data.metrics == {"rsum": 1.0, "train/loss": pytest.approx(0.1 / 3)}
    assert {r.info.status for r in found.values()} == {"FINISHED"} and not pending(one)


# ---- what cannot be written --------------------------------------------------------------------


def test_artifacts_that_cannot_be_written_hold_up_nothing_else(database, tracker, tmp_path, capsys):
    (tmp_path / "mlflow-artifacts").write_text("a file where the folder should be")
    one = tracker()
    one.log("", params={"a": 1})
    one.artifact("", "settings.yaml", b"a: 1")
    one.artifact("", "report.html", b"<p>")
    one.log("train", metrics={"rsum": 1.0})
    one.end("train")
    one.finish()
    found = by_name(runs_of(database))
    assert found["train"].data.metrics == {"rsum": 1.0} and found["main"].data.params == {"a": "1"}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    said = capsys.readouterr().err
    assert said.count("artifacts that cannot be written") == len(said.splitlines()) == 1
    assert not pending(one)


def test_a_server_that_cannot_store_files_now_gets_them_later(
    serving, tracker, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    artifacts = serving.folder / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.write_text("a file where the folder should be")
    one = tracker(experiment="no files")
    one.artifact("", "settings.yaml", b"a: 1")
    train(one, rsum=1.0)
    found = by_name(runs_of(serving.uri, "no files"))
    assert found["train"].data.metrics["rsum"] == 1.0
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert [entry["kind"] for entry in pending(one)] == ["artifact"]
    said = capsys.readouterr().err
    assert "could not take all files" in said  # before that: an error 500, or a line that broke
    artifacts.unlink()
    tracker(experiment="no files").finish()
    (file,) = client_of(serving.uri).list_artifacts(found["main"].info.run_id)
    assert file.path == "settings.yaml" and not pending(one)
    assert {r.info.status for r in runs_of(serving.uri, "no files")} == {"FINISHED"}


def test_all_parameters_metrics_and_odd_values_arrive(serving, tracker, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    one = tracker(experiment="team/recipe: 1")
    params = {f"p{number}": number for number in range(180)}
    one.log("train", params={**params, "long": "é" * 9000, "a[0]": 1, "/root": 2})
    one.log("train", params={f"long{n}": "é" * 5000 for n in range(100)})  # beyond a call's bytes
    one.log("train", tags={"halftone.error": "x" * 20000})
    odd = {"nan": math.nan, "inf": math.inf, "text": "no", "none": None, "flag": True, "R@1": 5}
    one.log("train", metrics=odd)
    one.records("train", [{"step": s, "train/loss": s, "text": "no"} for s in range(1, 2501)])
    one.finish()
    run = by_name(runs_of(serving.uri, "team/recipe: 1"))["train"]
    assert len(run.data.params) == 283
    assert {name: run.data.params[name] for name in params} == {
        n: str(v) for n, v in params.items()
    }
    assert run.data.params["long"].endswith("… (9,000 characters)")
    assert run.data.params["a_0_"] == "1" and run.data.params["root"] == "2"
    assert run.data.tags["halftone.error"].endswith("… (20,000 characters)")
    metrics = run.data.metrics
    assert math.isnan(metrics["nan"]) and metrics["inf"] > 1e300 and metrics["R_1"] == 5
    assert metrics["flag"] == 1 and not {"text", "none"} & set(metrics)
    steps = [step for step, _ in curve(serving.uri, run, "train/loss")]
    assert steps == list(range(1, 2501))
    said = capsys.readouterr().err
    assert "metric text (it is no number)" in said and "metric none" in said


def test_one_value_that_is_refused_holds_up_no_other(database, tracker, monkeypatch, capsys):
    monkeypatch.setenv(
        "MLFLOW_TRUNCATE_LONG_VALUES", "false"
    )  # as servers have limits of their own
    monkeypatch.setattr("mlflow.utils.validation.MAX_PARAM_VAL_LENGTH", 500)
    monkeypatch.setattr("mlflow.utils.validation.MAX_TAG_VAL_LENGTH", 500)
    one = tracker()
    one.log("train", params={"a": 1, "long": "x" * 3000}, tags={"short": 1, "much": "y" * 3000})
    one.log("train", metrics={"rsum": 1.0})
    one.finish()
    run = by_name(runs_of(database))["train"]
    assert run.data.params["a"] == "1" and run.data.params["long"].endswith("(3,000 characters)")
    assert run.data.tags["short"] == "1" and "much" not in run.data.tags
    assert run.data.metrics == {"rsum": 1.0}
    assert "does not take the tag much" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///tmp/some/mlruns", "no longer writes to folders of files"),
        ("nonsense://there", "knows no such URI"),
    ],
)
def test_what_lasts_is_told_once_and_not_promised(
    tracker, database, monkeypatch, capsys, uri, words
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    train(tracker(), rsum=1.0)
    said = capsys.readouterr().err
    assert said.count(words) == 1 == len(said.splitlines()) and "until then" in said
    assert "is written by the next run" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    last = tracker()
    last.finish()
    assert by_name(runs_of(database))["train"].data.metrics["rsum"] == 1.0
    assert not pending(last)


def test_tracking_that_fails_itself_ends_no_work(tracker, database, tmp_path, capsys):
    (tmp_path / "run").write_text("a file where the run folder should be")
    train(tracker(), rsum=1.0)
    assert "cannot be told of this run" in capsys.readouterr().err


# ---- a server that goes and comes --------------------------------------------------------------


def test_a_server_that_is_back_gets_all_in_the_same_command(serving, tracker, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serving.uri)
    one = tracker(experiment="back")
    one.log("train", metrics={"a": 1.0})
    serving.kill()
    one.log("train", metrics={"b": 2.0})
    one.log("train", metrics={"b": 2.0, "c": 3.0})
    assert len(pending(one)) == 1
    serving.start()
    one.end("train")
    one.finish()
    found = by_name(runs_of(serving.uri, "back"))
    assert found["train"].data.metrics == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert [curve(serving.uri, found["train"], name) for name in "abc"] == [
        *([(0, 1.0)], [(0, 2.0)], [(0, 3.0)]),
    ]
    assert {r.info.status for r in found.values()} == {"FINISHED"} and not pending(one)
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_what_waits_does_not_grow_with_every_command(tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    sizes = []
    for _ in range(3):
        one = tracker()
        one.artifact("", "report.html", b"<p>")
        train(one, rsum=1.0)
        sizes.append(len(pending(one)))
    assert sizes[0] == sizes[1] == sizes[2]
    one = tracker()
    train(one, "f2")
    assert "artifact" not in {entry["kind"] for entry in pending(one)}  # the other model is gone
