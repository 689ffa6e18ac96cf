"""Stores that are busy, hang up or are out of reach: asked again, a limited number of times."""

import errno
import http.server
import threading
from pathlib import Path

import aiohttp
import botocore.exceptions
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jobs.cluster.examine import Examiner
from pipeline.errors import Unreachable
from pipeline.sharding import loading
from pipeline.sharding.images import Rejected
from pipeline.storage import cache, parquet, store
from schemas.settings import SourceSettings


class Flaky(http.server.BaseHTTPRequestHandler):
    """An object store that first says it is busy, then hangs up half way, then answers."""

    answers: list[str] = []

    def do_GET(self) -> None:
        answer = self.answers.pop(0) if self.answers else "whole"
        self.send_response(503 if answer == "busy" else 200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"01234" if answer == "half" else b"0123456789")
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def flaky(monkeypatch):
    """A store whose next answers the test decides."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # these went to another address
    yield Flaky
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answers", [["busy"], ["half"], ["busy", "half", "half"]])
def test_a_store_that_is_busy_or_hangs_up_is_asked_again(flaky, answers):
    flaky.answers = list(answers)
    assert store.read_bytes("s3://bucket/file") == b"0123456789"
    assert not flaky.answers


def test_a_store_that_is_always_busy_is_asked_a_limited_number_of_times(flaky, no_waits):
    flaky.answers = ["busy"] * 1000
    with pytest.raises(Unreachable, match="s3://bucket/file cannot be reached"):
        store.read_bytes("s3://bucket/file")
    assert 3 * 6 <= 1000 - len(flaky.answers) <= 20 * 6


def test_a_store_that_nobody_answers_for_is_bad_input(flaky, monkeypatch, no_waits):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unreachable, match="s3://bucket/file cannot be reached: Could not connect"):
        store.read_bytes("s3://bucket/file")


@pytest.fixture
def no_waits(monkeypatch):
    """Stores are asked as often as ever, at once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr(store, "WAITS", (0,) * len(store.WAITS))


class Breaking(MemoryFileSystem):
    """A store that fails with the next of `errors` until there is none left."""

    protocol = "breaking"
    errors: list[Exception] = []


def breaks(name: str):
    """A method of `Breaking`: the next error, else what a store in memory does."""

    def method(self, *arguments, **options):
        if Breaking.errors:
            raise Breaking.errors.pop(0)
        return getattr(MemoryFileSystem, name)(self, *arguments, **options)

    return method


for name in ("cat_file", "pipe_file", "info", "ls", "exists", "rm", "get_file", "put_file"):
    setattr(Breaking, name, breaks(name))


@pytest.fixture
def breaking(no_waits):
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    store.write_bytes("breaking://folder/file", b"0123456789")
    yield Breaking.errors
    Breaking.errors.clear()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class Answer(Exception):
    """What botocore raises of an answer."""

    def __init__(self, status: int):
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}


NO_ANSWER = {
    "refused": ConnectionRefusedError("refused"),
    "reset": ConnectionResetError("reset by peer"),
    "no answer in time": TimeoutError("timed out"),
    "no line": OSError(errno.EHOSTUNREACH, "no route to host"),
    "no line, by botocore": botocore.exceptions.ConnectTimeoutError(endpoint_url="http://s3"),
    "no answer, by botocore": botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3"),
    "no server, by botocore": botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
    "hung up, by aiohttp": aiohttp.ClientPayloadError("the answer breaks off"),
    "no server, by aiohttp": aiohttp.ServerDisconnectedError(),
    "slow down": OSError(errno.EBUSY, "reduce your request rate"),
    "an error of its own": caused(OSError(errno.EIO, "bad gateway"), Answer(502)),
}
ANSWERS = {
    "not found": FileNotFoundError("no such file"),
    "forbidden": PermissionError("access denied"),
    "not allowed": caused(PermissionError("access denied"), Answer(403)),
    "no such range": caused(OSError(errno.EINVAL, "bad range"), Answer(416)),
    "our disk is full": OSError(errno.ENOSPC, "no space left on device"),
}


@pytest.mark.parametrize("error", NO_ANSWER.values(), ids=NO_ANSWER.keys())
def test_where_no_answer_comes_a_store_is_asked_again_and_that_is_logged(breaking, caplog, error):
    breaking.extend([error] * len(store.WAITS))
    assert store.read_bytes("breaking://folder/file") == b"0123456789"
    assert len(caplog.messages) == len(store.WAITS) and not breaking
    assert "breaking://folder/file does not answer" in caplog.messages[0]
    assert "it is asked again in 0 s" in caplog.messages[0]


@pytest.mark.parametrize("error", NO_ANSWER.values(), ids=NO_ANSWER.keys())
def test_a_store_that_never_answers_is_said_to_be_out_of_reach(breaking, error):
    breaking.extend([error] * (len(store.WAITS) + 1))
    with pytest.raises(Unreachable, match="^breaking://folder/file cannot be reached: ") as raised:
        store.read_bytes("breaking://folder/file")
    assert str(raised.value).count("cannot be reached") == 1 and not breaking


@pytest.mark.parametrize("error", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_a_store_answered_is_not_asked_again(breaking, caplog, error):
    breaking.extend([error] * 2)
    with pytest.raises(type(error)):
        store.read_bytes("breaking://folder/file")
    assert len(breaking) == 1 and not caplog.messages


def test_everything_is_asked_again(breaking, tmp_path):
    uri = "breaking://folder/file"
    questions = {
        "exists": lambda: store.exists(uri),
        "list_files": lambda: store.list_files("breaking://folder"),
        "stamp": lambda: store.stamp(uri)[0],
        "write_bytes": lambda: store.write_bytes(uri, b"01"),
        "temporary": lambda: write_some(uri),
        "kept": lambda: Path(cache.kept(uri, whole(b"012"), 100)).read_bytes(),
        "finished": lambda: parquet.finished(uri, "f"),
        "remove": lambda: store.remove(uri),
    }
    answers = {}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HALFTONE_CACHE", str(tmp_path))
        for name, question in questions.items():
            breaking.extend([ConnectionResetError("reset by peer")] * 2)
            answers[name] = question()
            assert not breaking, name
    assert answers == {
        **{"exists": True, "list_files": {"file": 10}, "stamp": 10, "write_bytes": None},
        **{"temporary": None, "kept": b"012", "finished": None, "remove": None},
    }
    assert not store.exists(uri)


def write_some(uri: str) -> None:
    with store.temporary(uri) as path:
        Path(path).write_bytes(b"012")


def whole(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": store.sha256(data)}


def test_a_picture_whose_store_does_not_answer_is_no_bad_picture(breaking):
    def loaded(name: str) -> bytes:
        rows = [{"source": "csv", "uri": f"breaking://folder/{name}"}]
        ((_, load),) = loading.in_order(rows, SourceSettings(kind="csv", fetch_threads=1), 100)
        return load()

    breaking.append(TimeoutError("timed out"))
    assert loaded("file") == b"0123456789"
    breaking.extend([TimeoutError("timed out")] * 100)
    with pytest.raises(Unreachable, match="breaking://folder/file cannot be reached: timed out"):
        loaded("file")
    breaking.clear()
    with pytest.raises(Rejected, match="file missing"):
        loaded("nowhere")


def test_the_doctor_asks_storage_once(breaking):
    breaking.extend([TimeoutError("timed out")] * 2)
    assert "timed out" in Examiner().write("breaking://folder", "node")
    assert len(breaking) == 1
