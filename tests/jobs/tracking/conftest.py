"""A database of MLflow's, made once and copied; a server; a tracker of a new run folder."""

import shutil
from pathlib import Path

import pytest

from jobs.tracking import server as mlflow_server
from jobs.tracking import tracker as mlflow_tracker
from jobs.tracking.tracker import Tracker
from tests.helpers.mlflow_server import Server


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_server.client(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """What a process says once is said again in every test; nobody waits long for a server."""
    monkeypatch.setattr(mlflow_tracker, "_said", set())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture
def database(empty_database, tmp_path, monkeypatch) -> str:
    """URI of a database of this test's own, where trackers write."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="module")
def serving(tmp_path_factory, empty_database):
    """A server, running; a test that kills it starts it again."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = Server(folder).start()
    yield server
    server.kill()


@pytest.fixture
def tracker(tmp_path):
    """Makes trackers of a model of the test's run folder, each as a command's of its own."""

    def make(name: str = "main", folder: str = "run", experiment: str = "recipe") -> Tracker:
        return Tracker(experiment, str(tmp_path / folder), name)

    return make
