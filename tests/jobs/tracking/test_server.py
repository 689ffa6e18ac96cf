"""Where MLflow is, and how its database comes to be: by one process, whole or not at all."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.tracking import server as mlflow_server
from tests.helpers.mlflow_server import runs_of

FIRST = """
import sys, time
from pathlib import Path
from jobs.tracking.tracker import Tracker
import mlflow.store.tracking.sqlalchemy_store
root, name, go = sys.argv[1:]
Path(f"{go}.{name}").touch()
while not Path(go).exists():
    time.sleep(0.01)
tracker = Tracker("recipe", root, name)
tracker.log("train", metrics={name: 1.0})
tracker.records("train", [{"step": step, "train/loss": 1.0} for step in range(50)])
tracker.finish()
"""


@pytest.mark.own_cluster
@pytest.mark.parametrize("folders", [("one", "one"), ("one", "two")])
def test_two_first_runs_at_once_make_one_database(tmp_path, folders):
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    some = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST, str(tmp_path / folder), name, str(tmp_path / "go")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for folder, name in zip(folders, ("a", "b"), strict=True)
    ]
    deadline = time.monotonic() + 600
    while not all((tmp_path / f"go.{name}").exists() for name in "ab"):
        assert time.monotonic() < deadline and not any(p.poll() for p in some)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=600)[1] for process in some] == ["", ""]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = runs_of(f"sqlite:///{tmp_path}/mlflow.db", "recipe")
    assert sorted(r.info.run_name for r in found) == ["a", "b", "train", "train"]
    assert {name for r in found for name in r.data.metrics} == {"a", "b", "train/loss"}
    assert not list(tmp_path.glob(".mlflow*"))


def test_a_killed_process_leaves_no_half_of_a_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    left = tmp_path / ".mlflow.db-0.making"
    left.write_bytes(b"half")
    (tmp_path / "mlflow.db").touch()  # as a process that only opened it leaves it
    assert mlflow_server.client(uri).search_experiments()
    assert not left.exists() and (tmp_path / "mlflow.db").stat().st_size > 0


def test_paths_in_uris_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, uri in [
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        (f"sqlite:///{tmp_path}/x.db", f"sqlite:///{tmp_path}/x.db"),
        ("./mlruns", f"file://{tmp_path}/mlruns"),
        ("file:mlruns", f"file://{tmp_path}/mlruns"),
        ("http://there:5000", "http://there:5000"),
        ("databricks", "databricks"),
        ("sqlite://", "sqlite://"),
    ]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert mlflow_server.default_uri("/run/folder") == uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert mlflow_server.default_uri("/run/folder") == "sqlite:////run/mlflow.db"
    assert mlflow_server.database("sqlite:////run/mlflow.db") == Path("/run/mlflow.db")
    assert mlflow_server.database("http://there:5000") is None
