"""Errors of a real MLflow client are told apart: what passes, and what no waiting mends."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, TEMPORARILY_UNAVAILABLE

from jobs.tracking import server as mlflow_server
from jobs.tracking.errors import Kind, told_apart


def error_of(uri: str, monkeypatch) -> Exception:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(Exception) as caught:
        mlflow_server.client(uri).get_experiment_by_name("x")
    return caught.value


@pytest.fixture(scope="module")
def answering():
    """URI of a server that answers with the HTTP status that its first folder names."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"<html>no</html>"
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (503, Kind.PASSING, "503"),
        (500, Kind.PASSING, "500"),
        (429, Kind.PASSING, "429"),
        (401, Kind.REFUSED, "MLFLOW_TRACKING_USERNAME"),
        (403, Kind.REFUSED, "403"),
        (404, Kind.REFUSED, "404"),
        (200, Kind.REFUSED, "no MLflow server"),
    ],
)
def test_by_what_a_server_answers(answering, monkeypatch, status, kind, words):
    uri = f"{answering}/{status}"
    verdict = told_apart(error_of(uri, monkeypatch), uri)
    assert verdict.kind is kind and words in f"{verdict.why}; {verdict.do}"
    assert bool(verdict.do) == (kind is Kind.REFUSED)


def test_no_answer_passes(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert told_apart(error_of(uri, monkeypatch), uri).kind is Kind.PASSING
    verdict = told_apart(error_of("http://127.0.0.1:9", monkeypatch), "http://127.0.0.1:9")
    assert (verdict.kind, verdict.why) == (Kind.PASSING, "Connection refused")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///tmp/somewhere/mlruns", "sqlite:////ABSOLUTE/mlflow.db"),
        ("nonsense://there", "MLFLOW_TRACKING_URI"),
        ("sqlite:////proc/none/mlflow.db", "let this user write"),
        ("mysql+nothing://there/mlflow", "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_uri_that_can_never_be_written_says_what_to_do(uri, words, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    verdict = told_apart(error_of(uri, monkeypatch), uri)
    assert verdict.kind is Kind.REFUSED and words in f"{verdict.why}; {verdict.do}"
    assert not verdict.why.endswith("…")  # a whole sentence


def test_of_databases(tmp_path, monkeypatch):
    ruined = tmp_path / "mlflow.db"
    ruined.write_bytes(b"no database at all" * 1000)
    uri = f"sqlite:///{ruined}"
    verdict = told_apart(error_of(uri, monkeypatch), uri)
    assert verdict.kind is Kind.REFUSED and str(ruined) in verdict.do
    locked = MlflowException("(sqlite3.OperationalError) database is locked")
    locked.error_code = "TEMPORARILY_UNAVAILABLE"
    assert told_apart(locked, uri).kind is Kind.PASSING
    torn = MlflowException("(sqlite3.DatabaseError) database disk image is malformed", BAD_REQUEST)
    assert told_apart(torn, uri).kind is Kind.REFUSED
    on_server = told_apart(torn, "http://there:5000")
    assert on_server.kind is Kind.REFUSED and "on the server" in on_server.do
    busy = MlflowException("(psycopg2.OperationalError) too many", TEMPORARILY_UNAVAILABLE)
    assert told_apart(busy, "postgresql://there/mlflow").kind is Kind.PASSING


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(13, "Permission denied", "/srv/mlflow"), Kind.UNWRITABLE),
        (OSError(30, "Read-only file system", "/srv/mlflow"), Kind.UNWRITABLE),
        (FileNotFoundError(2, "No such file or directory", "/srv"), Kind.UNWRITABLE),
        (OSError(28, "No space left on device"), Kind.PASSING),
        (ConnectionResetError(104, "Connection reset by peer"), Kind.PASSING),
        (ModuleNotFoundError("No module named 'boto3'"), Kind.UNWRITABLE),
        (RuntimeError("An error occurred (AccessDenied): no"), Kind.UNWRITABLE),
        (RuntimeError("An error occurred (SlowDown): later"), Kind.PASSING),
        (TypeError("a mistake of our own"), Kind.UNWRITABLE),
    ],
)
def test_of_files(error, kind):
    assert told_apart(error, "http://there:5000", files=True).kind is kind
