"""MLflow's server, or the database that stands in for one: where it is and how it is opened."""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from pipeline.storage import store

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a line a stage
# A server that is away must not hold up the work for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

SQLITE = "sqlite:///"
OWN_WORDS = ("databricks", "uc:")  # URIs without :// that are no paths
_opened: dict[str, list] = {}  # by URI: how often its file was another one, and which it is


def default_uri(root: str) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file beside the run folders; a path in it is absolute."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _absolute(store.keyless(uri))
    home = Path(root).parent if store.is_local(root) else Path.home() / "halftone"
    return f"{SQLITE}{home / 'mlflow.db'}"


def _absolute(uri: str) -> str:
    """The same database from any folder: workers and later commands run in other ones."""
    if path := database(uri):
        return f"{SQLITE}{path}"
    if "://" in uri or uri.startswith((*OWN_WORDS, "sqlite:")):
        return uri
    return Path(uri.removeprefix("file:")).expanduser().absolute().as_uri()


def database(uri: str) -> Path | None:
    """The file of a SQLite URI; None where the URI is another one."""
    path = uri.removeprefix(SQLITE)
    named = uri.startswith(SQLITE) and path not in ("", ":memory:") and "?" not in path
    return Path(path).expanduser().absolute() if named else None


def client(uri: str):
    """MLflow's client, with everything there that it needs.

    A new database is made by one process while the others wait; one that was removed or replaced
    since it was opened is opened again.
    """
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # advice, line after line
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("http"):
        return MlflowClient(tracking_uri=uri)
    from mlflow.store.db import utils

    logging.getLogger(utils.__name__).setLevel(logging.CRITICAL)  # tracebacks
    utils.MAX_RETRY_COUNT = 3  # of opening a database, with waits that double: ten take minutes
    if (path := database(uri)) is None:
        return MlflowClient(tracking_uri=uri)
    times, known = _opened.setdefault(uri, [0, None])
    if known is not None and known == _which(path):
        return MlflowClient(tracking_uri=_again(path, times))
    with store.locked(f"{path}.lock"):
        if not path.exists() or path.stat().st_size == 0:
            _make(path)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as there:
            there.execute("SELECT count(*) FROM sqlite_master").fetchone()  # raises: damaged
        times += known is not None
        _opened[uri] = [times, _which(path)]
        return MlflowClient(tracking_uri=_again(path, times))


def _which(path: Path) -> tuple | None:
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _again(path: Path, times: int) -> str:
    """MLflow keeps what it opened by its URI: after the file became another, so does the URI."""
    return f"{SQLITE}{path.parent}/{'./' * times}{path.name}"


def _make(path: Path) -> None:
    """A new database, whole or not at all: MLflow makes it in many steps, and cannot go on."""
    from mlflow import MlflowClient

    making = path.with_name(f".{path.name}-{uuid4().hex}.making")  # MLflow knows a name for good
    for old in path.parent.glob(f".{path.name}-*.making*"):  # of processes that were killed
        old.unlink()
    MlflowClient(tracking_uri=f"{SQLITE}{making}")
    os.replace(making, path)


@contextlib.contextmanager
def current(uri: str) -> Iterator[None]:
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
