"""A real MLflow server on this machine, which can be killed and started again; what it holds."""

import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import psutil
from mlflow import MlflowClient

from jobs.tracking import server as mlflow_server

ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Server:
    """`mlflow server` with its database and its artifacts in a folder."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.options, self.process = folder, options, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    def start(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        store = self.options or ("--artifacts-destination", str(self.folder / "artifacts"))
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = psutil.Popen(
                [*command, "--backend-store-uri", f"sqlite:///{self.database}", *store],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **ENVIRONMENT},
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the MLflow server does not come up"
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """At once, with whatever it is doing."""
        if self.process is None:
            return
        for process in [*self.process.children(recursive=True), self.process]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        self.process = None


def client_of(uri: str) -> MlflowClient:
    return MlflowClient(mlflow_server.client(uri).tracking_uri)


def runs_of(uri: str, experiment: str | None = None) -> list:
    """The runs there, the newest first: of an experiment, or of all."""
    client = client_of(uri)
    found = client.search_experiments()
    ids = [e.experiment_id for e in found if experiment in (None, e.name)]
    return client.search_runs(ids, order_by=["attributes.start_time DESC"]) if ids else []


def curve(uri: str, run, name: str) -> list[tuple]:
    """(step, value) of every point of a run's metric, in order."""
    points = client_of(uri).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]
