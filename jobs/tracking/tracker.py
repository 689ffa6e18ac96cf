"""What is remembered of a run: the one place that knows MLflow.

One parent run a model, a child run a stage. The run ids are kept in the run folder, so a crashed
or repeated run goes on in the same MLflow runs. Only the driver's side writes; where the server
does not answer the work goes on, and what was not written is written the next time.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs.tracking import logged_model
from pipeline.storage import store

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line a stage
# A server that is away must not hold up the work for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

IDS = "tracking.json"
PENDING = "tracking-pending.json"


def default_uri(root: str) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file beside the run folders."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return store.keyless(uri)
    home = Path(root).parent if store.is_local(root) else Path.home() / "halftone"
    return f"sqlite:///{home / 'mlflow.db'}"


class Tracker:
    """The MLflow runs of one model of one run folder."""

    def __init__(self, experiment: str, root: str, name: str):
        self.experiment, self.root, self.name = experiment, root, name
        self.uri = default_uri(root)
        self.pending: list[list] = []
        self.away = False
        self.touched: set[str] = set()
        self._ids: dict[str, str] = {}

    def log(self, stage: str, *, metrics=None, params=None, tags=None, step: int = 0) -> None:
        """Metrics at a step, parameters and tags of a stage; '' is the parent run."""
        now = int(time.time() * 1000)
        self._write(stage, "batch", [metrics or {}, params or {}, tags or {}, step, now])

    def records(self, stage: str, records: list[dict]) -> None:
        """Metrics by step, those left out that are there already."""
        self._write(stage, "records", [records])

    def artifact(self, stage: str, name: str, data: bytes) -> None:
        """A file of a stage."""
        self._write(stage, "artifact", [name, data.decode("utf-8", "surrogateescape")])

    def recorder(self, stage: str) -> Callable[[list[dict]], None]:
        """A function for the training's controller that logs records as they come."""
        run_id = self._attempt(lambda: self._run_id(stage))
        return _Recorder(self.uri, run_id) if run_id else lambda records: None

    def monitor(self, stage: str) -> Callable[[str], contextlib.AbstractContextManager]:
        """For the training's workers: while it is entered, their node's load is logged."""
        run_id = self._attempt(lambda: self._run_id(stage))
        return partial(_monitor, self.uri, run_id)

    def model(self, stage: str, folder: str, score: float) -> None:
        """Log a folder's trained model so that `mlflow.pyfunc.load_model` loads it.

        It becomes a version of the model registered under the recipe's name, with this model's
        name as alias, and `best` where no other version's score is higher.
        """
        names = self.experiment, self.name
        self._attempt(lambda: _log_model(self.uri, self._run_id(stage), folder, *names, score))

    def finish(self, status: str = "FINISHED") -> None:
        """End the runs that were written to; keep what could not be written for the next time."""
        self._attempt(self._replay)  # where this run had nothing of its own to write
        for stage in sorted(self.touched, reverse=True):
            self._attempt(partial(self._end, stage, status))
        uri = store.join(self.root, PENDING)
        if self.pending:
            kept = store.read_json(uri) if store.exists(uri) else []
            store.write_json(uri, kept + self.pending)
            self.pending = []
            said = f"halftone: MLflow at {self.uri} could not be written"
            do = f"what it lacks waits in {uri} and is written by the next run"
            print(f"{said}; {do}", file=sys.stderr)
        self.touched.clear()
        self._ids.clear()

    def _end(self, stage: str, status: str) -> None:
        self._client().set_terminated(self._ids[stage], status)

    def url(self) -> str:
        """Where the runs are to be seen, once `mlflow ui` runs."""
        experiment = self._known_ids().get(self.uri, {}).get("experiment", "")
        base = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"

    def ui_command(self) -> str | None:
        """The words after `mlflow` that open the UI, where no server runs."""
        if self.uri.startswith("http"):
            return None
        return f"ui --backend-store-uri {self.uri} --port 5000"

    def _write(self, stage: str, kind: str, values: list) -> None:
        entry = [self.name, stage, kind, values]
        if self.away or not self._attempt(lambda: self._replay() or self._apply(entry) or True):  # type: ignore[func-returns-value]
            self.pending.append(entry)

    def _apply(self, entry: list) -> None:
        _, stage, kind, values = entry
        run_id = self._run_id(stage)
        if kind == "batch":
            _log_batch(self._client(), run_id, *values)
        elif kind == "records":
            _record(self.uri, run_id, values[0])
        else:
            name, text = values
            folder, _, file = name.rpartition("/")
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary, file)
                path.write_bytes(text.encode("utf-8", "surrogateescape"))
                self._client().log_artifact(run_id, str(path), folder or None)

    def _replay(self) -> None:
        """Write what an earlier run of this model could not."""
        uri = store.join(self.root, PENDING)
        if not self.touched and store.exists(uri):
            entries = store.read_json(uri)
            for entry in entries:
                if entry[0] == self.name:
                    self._apply(entry)
            if others := [entry for entry in entries if entry[0] != self.name]:
                store.write_json(uri, others)
            else:
                store.remove(uri)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        if self.away:
            return None
        try:
            return action()
        except Exception as error:  # tracking must never end the work it tracks
            self.away = True
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            said = f"halftone: MLflow at {self.uri} cannot be written ({reason[:160]})"
            print(f"{said}; going on", file=sys.stderr)
            return None

    def _client(self):
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # migrations and advice, line after line
            logging.getLogger(name).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=self.uri)

    def _known_ids(self) -> dict[str, dict]:
        """Of experiment and runs, by the server's URI."""
        uri = store.join(self.root, IDS)
        return store.read_json(uri) if store.exists(uri) else {}

    def _run_id(self, stage: str) -> str:
        """The stage's run, the one of the last time if there was one."""
        if stage in self._ids:
            return self._ids[stage]
        parent = self._run_id("") if stage else None
        key = f"{self.name}/{stage}" if stage else self.name
        client, known = self._client(), self._known_ids()
        ids = known.get(self.uri, {})
        if "experiment" not in ids:
            ids["experiment"] = _experiment(client, self.experiment, self.uri)
        if key in ids:
            client.update_run(ids[key], status="RUNNING")
        else:
            tags = {"halftone.root": self.root, "halftone.stage": stage or "run"}
            if parent:
                tags["mlflow.parentRunId"] = parent
            run = client.create_run(ids["experiment"], run_name=stage or self.name, tags=tags)
            ids[key] = run.info.run_id
        store.write_json(store.join(self.root, IDS), {**known, self.uri: ids})
        self._ids[stage] = ids[key]
        self.touched.add(stage)
        return ids[key]


def _experiment(client, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    folder = None
    if uri.startswith("sqlite:///"):  # beside the database, not in whatever folder this is
        folder = str(Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts")
    return client.create_experiment(name, artifact_location=folder)


def _log_batch(client, run_id: str, metrics, params, tags, step: int, now: int) -> None:
    from mlflow.entities import Metric, Param, RunTag

    known = client.get_run(run_id).data.params
    changed = {k: str(v)[:6000] for k, v in params.items() if known.get(k) != str(v)[:6000]}
    fresh = {k: v for k, v in changed.items() if k not in known}
    tags = {**tags, **{f"changed.{k}": v for k, v in changed.items() if k in known}}
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()],
        params=[Param(name, value) for name, value in list(fresh.items())[:100]],
        tags=[RunTag(name, str(value)) for name, value in tags.items()],
    )


def _record(uri: str, run_id: str, records: list[dict]) -> None:
    """Log records ({"step": …, name: value, …}) unless their step is there already."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=uri)
    names = {name for record in records for name in record} - {"step"}
    there = {n: {m.step for m in client.get_metric_history(run_id, n)} for n in names}
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, record["step"])
        for record in records
        for name, value in record.items()
        if name != "step" and record["step"] not in there[name]
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


@contextlib.contextmanager
def _current(uri: str) -> Iterator[None]:
    """`uri` as MLflow's current one; MLflow keeps that in the environment, which is put back."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)


class _Recorder:
    """Logs a training's records as they come, until MLflow does not answer once.

    It lives in the training's controller, where an error would end the training. The driver writes
    all records when the training is over.
    """

    def __init__(self, uri: str, run_id: str):
        self.uri, self.run_id, self.away = uri, run_id, False

    def __call__(self, records: list[dict]) -> None:
        if self.away:  # every try would hold the training up
            return
        try:
            _record(self.uri, self.run_id, records)
        except Exception:  # tracking must never end the work it tracks
            self.away = True


@contextlib.contextmanager
def _monitor(uri: str, run_id: str | None, node: str) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of this node, as `system/NODE/…`, every ten seconds."""
    reachable = uri.startswith("http") or Path(uri.removeprefix("sqlite:///")).exists()
    if run_id is None or not reachable:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=10, node_id=node, resume_logging=True, tracking_uri=uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _log_model(uri: str, run_id: str, folder: str, model: str, alias: str, score: float) -> None:
    import mlflow

    with _current(uri), mlflow.start_run(run_id=run_id):
        info = logged_model.log_model(folder)
    client = mlflow.MlflowClient(tracking_uri=uri)
    if not client.search_registered_models(f"name='{model}'"):
        client.create_registered_model(model)
    with _current(uri):  # where a model URI leads, MLflow asks there
        made = client.create_model_version(model, info.model_uri, run_id, model_id=info.model_id)
    version = made.version
    client.set_model_version_tag(model, version, "val_rsum", str(score))
    client.set_registered_model_alias(model, _alias(alias), version)
    versions = client.search_model_versions(f"name='{model}'")
    best = max(versions, key=lambda v: (float(v.tags.get("val_rsum", -1)), int(v.version)))
    client.set_registered_model_alias(model, "best", best.version)


def _alias(name: str) -> str:
    """A model's name as MLflow takes it for an alias; `latest` and `v1` are its own words."""
    plain = re.sub(r"[^\w-]", "-", name, flags=re.ASCII)
    return f"model-{plain}" if re.fullmatch(r"latest|v\d+|best", plain) else plain
