"""MLflow: what a run leaves there, and what happens where it is away."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from jobs.cli.main import main
from jobs.tracking.tracker import Tracker
from jobs.tracking.watchers import Recorder
from pipeline.sources import drawn
from pipeline.storage import store
from tests.helpers.mlflow_server import client_of, curve, runs_of
from tests.helpers.stages import TINY


@pytest.fixture(scope="module")
def client(finished_run):
    return MlflowClient(f"sqlite:///{Path(finished_run).parent / 'mlflow.db'}")


@pytest.fixture(scope="module")
def runs(client):
    experiment = client.get_experiment_by_name("drawn_tiny")
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}


def test_one_parent_run_with_a_child_a_stage(runs):
    parent = runs["main"]
    children = [r for name, r in runs.items() if name != "main"]
    stages = {"ingest", "shard", "embed", "label", "train", "evaluate", "rerank", "search"}
    assert {r.info.run_name for r in children} == stages
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert parent.data.metrics["reranked/rsum"] > 0
    assert parent.data.params["train.batch_size"] == "16"


def test_the_loss_is_there_by_step_and_once(client, runs, finished_run):
    records = store.read_json(f"{finished_run}/5-model/main/history.json")["records"]
    logged = client.get_metric_history(runs["train"].info.run_id, "train/loss")
    assert [m.step for m in logged] == [r["step"] for r in records if "train/loss" in r]


def test_the_report_and_the_settings_are_artifacts(client, runs):
    names = {a.path for a in client.list_artifacts(runs["main"].info.run_id)}
    assert {"report.html", "settings.yaml"} <= names


def test_the_model_loads_again_in_a_new_process(client, runs, finished_run, tmp_path):
    outputs = runs["train"].outputs.model_outputs
    code = (
        "import mlflow, json, sys; mlflow.set_tracking_uri(sys.argv[1]);"
        "m = mlflow.pyfunc.load_model(f'models:/{sys.argv[2]}');"
        "rows = [{'text': 'a red circle'}, {'image': sys.argv[3]}];"
        "print(json.dumps(m.predict(rows)))"
    )
    uri = f"sqlite:///{Path(finished_run).parent / 'mlflow.db'}"
    picture = "data:image/jpeg;base64," + base64.b64encode(drawn.load("drawn:0/test/3/48")).decode()
    done = subprocess.run(
        [sys.executable, "-c", code, uri, outputs[0].model_id, picture],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    vectors = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout else done.stderr
    assert len(vectors) == 2
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in vectors)


def test_a_server_that_is_away_does_not_stop_the_work(tmp_path, monkeypatch, capsys):
    root = str(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracker("experiment", root, "main")
    away.log("train", metrics={"x": 1.0}, params={"a": 2}, step=3)
    away.records("train", [{"step": 1, "train/loss": 0.5}])
    away.finish()
    assert "127.0.0.1:9" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    back = Tracker("experiment", root, "main")
    back.log("train", metrics={"y": 2.0})
    back.finish()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = {
        r.info.run_name: r.data.metrics
        for r in client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    }
    assert found["train"] == {"x": 1.0, "train/loss": 0.5, "y": 2.0}
    assert not store.exists(f"{root}/tracking-pending.json")


def test_the_same_run_goes_on_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for step in (1, 2):
        tracker = Tracker("experiment", str(tmp_path / "run"), "main")
        tracker.records("train", [{"step": s, "train/loss": 1.0 / s} for s in range(1, step + 1)])
        tracker.finish()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["main", "train"]
    train = next(r for r in runs if r.info.run_name == "train")
    assert [m.step for m in client.get_metric_history(train.info.run_id, "train/loss")] == [1, 2]


def test_the_model_is_registered_and_the_best_version_has_an_alias(client, runs, finished_run):
    version = client.get_model_version_by_alias("drawn_tiny", "best")
    assert version.run_id == runs["train"].info.run_id
    best = max(
        record.get("val/rsum", -1.0)
        for record in store.read_json(f"{finished_run}/5-model/main/history.json")["records"]
    )
    assert float(version.tags["val_rsum"]) == pytest.approx(best)
    assert client.get_model_version_by_alias("drawn_tiny", "main").version == version.version


def one_gpu(monkeypatch) -> None:
    """A driver with one card, at work: what NVIDIA's library would say of it."""
    told = {
        "nvmlInit": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "card",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=30e9, total=80e9),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=63),
        "nvmlDeviceGetPowerUsage": 350_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    }
    for name, value in told.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_load_of_the_node_is_logged(tmp_path, monkeypatch, gpu):
    if gpu:
        one_gpu(monkeypatch)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    publish, published = SystemMetricsMonitor.publish_metrics, threading.Event()

    def noted(monitor, metrics):
        publish(monitor, metrics)
        published.set()

    monkeypatch.setattr(SystemMetricsMonitor, "publish_metrics", noted)
    tracker = Tracker("experiment", str(tmp_path / "run"), "main")
    with tracker.monitor("train")("node-0"):
        assert published.wait(600)
    tracker.finish()
    client = MlflowClient(tracker.uri)
    (train,) = client.search_runs(
        [client.get_experiment_by_name("experiment").experiment_id],
        "tags.`halftone.stage` = 'train'",
    )
    assert "system/node-0/cpu_utilization_percentage" in train.data.metrics
    of_gpu = {k: v for k, v in train.data.metrics.items() if k.startswith("system/node-0/gpu_0_")}
    assert {name.removeprefix("system/node-0/gpu_0_"): v for name, v in of_gpu.items()} == (
        {
            **{
                "utilization_percentage": 63,
                "power_usage_watts": 350,
                "power_usage_percentage": 50,
            },
            **{"memory_usage_percentage": 37.5, "memory_usage_megabytes": 30_000},
        }
        if gpu
        else {}
    )


def test_a_server_that_goes_away_ends_no_training_and_is_asked_once(monkeypatch):
    asked = []

    def no_answer(client, run_id, records, refused):
        asked.append(records)
        raise MlflowException("API request failed: connection refused")

    monkeypatch.setattr("jobs.tracking.writing.records", no_answer)
    record = Recorder("http://127.0.0.1:9", "run")
    record([{"step": 1, "train/loss": 2.0}])
    record([{"step": 2, "train/loss": 1.0}])
    assert len(asked) == 1
    record.again = 0.0  # a minute later
    record([])
    assert [r["step"] for r in asked[1]] == [1, 2]


def test_what_waits_is_written_by_a_run_that_has_nothing_to_do(tmp_path, monkeypatch):
    root = str(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracker("experiment", root, "main")
    away.log("train", metrics={"seconds": 3.0})
    away.finish()
    assert store.exists(f"{root}/tracking-pending.json")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    back = Tracker("experiment", root, "main")
    back.finish()
    assert not store.exists(f"{root}/tracking-pending.json")
    client = MlflowClient(back.uri)
    experiment = client.get_experiment_by_name("experiment").experiment_id
    (train,) = client.search_runs([experiment], "tags.`halftone.stage` = 'train'")
    assert train.data.metrics["seconds"] == 3.0 and train.info.status == "FINISHED"


def test_a_folder_that_is_trained_again_with_other_settings_has_new_runs(
    finished_run, tmp_path, ray_here, capsys
):
    root = str(shutil.copytree(finished_run, tmp_path / "runs/again"))
    shutil.copy(Path(finished_run).parent / "mlflow.db", tmp_path / "runs/mlflow.db")
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    store.write_json(  # it was tracked there, at this place
        f"{root}/tracking.json",
        {uri: next(iter(store.read_json(f"{root}/tracking.json").values()))},
    )
    models = store.read_json(f"{root}/tracking-models.json")
    store.write_json(f"{root}/tracking-models.json", {**models, "root": root})
    before = {r.info.run_id: dict(r.data.params) for r in runs_of(uri, "drawn_tiny")}
    flags = ["--root", root, "--batch-size", "24", "--train.epochs", "5", "--resume", "latest"]
    main("train", flags)
    main("train", flags)
    found = runs_of(uri, "drawn_tiny")
    new = {r.info.run_name: r for r in found if r.info.run_id not in before}
    assert set(new) == {"main", "train"} and len(found) == len(before) + 2
    assert {r.info.run_id: dict(r.data.params) for r in found if r.info.run_id in before} == before
    for run in new.values():
        assert run.info.status == "FINISHED" and run.data.params["train.batch_size"] == "24"
        assert not [tag for tag in run.data.tags if tag.startswith("changed.")]
    records = store.read_json(f"{root}/5-model/main/history.json")["records"]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert sorted(step for step, _ in curve(uri, new["train"], "train/loss")) == steps
    assert sorted(steps) == steps and steps[0] == 7  # from the beginning, at the new pace
    client = client_of(uri)
    version = client.get_model_version_by_alias("drawn_tiny", "main")
    assert version.run_id == new["train"].info.run_id and int(version.version) == 2
    assert "MLflow" not in capsys.readouterr().err  # nothing had to be told


@pytest.mark.own_cluster
def test_sigterm_leaves_what_was_finished_finished(tmp_path):
    root = tmp_path / "runs/ended"
    command = [sys.executable, "-m", "jobs", "run", *TINY, "--root", str(root)]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen([*command, "--encoder", "tfidf"], env=environment)
    deadline = time.monotonic() + 600
    while "main/shard" not in _tracked(root):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(600) > 0  # ended by itself
    found = runs_of(f"sqlite:///{tmp_path}/runs/mlflow.db", "drawn_tiny")
    status = {r.info.run_name: r.info.status for r in found}
    assert status == {"ingest": "FINISHED", "shard": "KILLED", "main": "KILLED"}


def _tracked(root: Path) -> dict:
    """The ids of the runs that have begun, by their keys."""
    path = root / "tracking.json"
    return next(iter(store.read_json(str(path)).values())) if path.exists() else {}
