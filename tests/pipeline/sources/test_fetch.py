"""Images at web addresses: a server here that stalls, errors, lies and redirects."""

import collections
import concurrent.futures
import http.server
import threading
import time

import pytest

from pipeline import sources
from pipeline.sources.readers import fetch
from schemas.settings import SourceSettings

IMAGE = bytes(range(256)) * 40
STALLS = 5.0  # seconds that a server keeps silent
LIMITS = {"fetch_timeout": 1.0, "fetch_retries": 2, "fetch_max_bytes": 100_000}


class Hostile(http.server.BaseHTTPRequestHandler):
    """What the path says: /stall, /cut, /endless, …"""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.strip("/").split("?")[0].replace("-", "_")
        self.server.asked[name] += 1
        try:
            getattr(self, name)(self.server.asked[name])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client had enough

    def send(self, status=200, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(headers.pop("length", len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def ok(self, _):
        self.send(body=IMAGE, content_type="image/jpeg")

    def noai(self, _):
        self.send(body=IMAGE, x_robots_tag="otherbot: noindex, noai")

    def who(self, _):
        agent = self.headers["User-Agent"]
        self.send(200 if "@" in agent else 403, IMAGE)

    def empty(self, _):
        self.send()

    def missing(self, _):
        self.send(404, b"<html>not here")

    def broken(self, _):
        self.send(500)

    def broken_twice(self, times):
        self.send(200, IMAGE) if times > 2 else self.send(503, b"busy")

    def busy_once(self, times):
        self.send(200, IMAGE) if times > 1 else self.send(429, retry_after="1")

    def busy_for_long(self, times):
        self.send(200, IMAGE) if times > 1 else self.send(503, retry_after="86400")

    def busy_for_nonsense(self, times):
        self.send(200, IMAGE) if times > 1 else self.send(503, retry_after="soon")

    def stall(self, _):
        self.server.over.wait(STALLS)

    def stall_inside(self, _):
        self.send(body=IMAGE[:100], length=len(IMAGE))
        self.server.over.wait(STALLS)

    def drip(self, _):
        self.send(length=1000)
        for _ in range(1000):
            self.wfile.write(b"x")
            if self.server.over.wait(0.05):
                return

    def cut(self, _):
        self.send(body=IMAGE[:500], length=len(IMAGE))
        self.close_connection = True

    def cut_once(self, times):
        self.cut(times) if times == 1 else self.ok(times)

    def cut_chunks(self, _):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"ff\r\n" + IMAGE[:255] + b"\r\nff\r\nabc")
        self.close_connection = True

    def longer_than_said(self, _):
        self.send(body=IMAGE, length=100)

    def huge(self, _):
        self.send(length=10**12)

    def endless(self, _):
        self.send_response(200)
        self.end_headers()
        while not self.server.over.is_set():
            self.wfile.write(IMAGE)

    def endless_chunks(self, _):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.over.is_set():
            self.wfile.write(b"%x\r\n%s\r\n" % (len(IMAGE), IMAGE))

    def moved(self, _):
        self.send(302, b"moved", location="/ok")

    def moved_in_circles(self, _):
        self.send(301, location="/moved-in-circles")

    def moved_with_endless_body(self, _):
        self.send_response(302)
        self.send_header("Location", "/ok")
        self.end_headers()
        while not self.server.over.is_set():
            self.wfile.write(IMAGE)

    def moved_to_a_file(self, _):
        self.send(302, location="file:///etc/hostname")

    def web_page(self, _):
        self.send(body=b"<!doctype html><title>Sign in", content_type="text/html; charset=utf-8")

    def mislabelled(self, _):
        self.send(body=b"\xff\xd8" + IMAGE, content_type="text/html")

    def no_answer(self, _):
        self.close_connection = True

    def no_http(self, _):
        self.wfile.write(b"hello\r\n\r\n")
        self.close_connection = True

    def cookie(self, _):
        self.send(body=IMAGE, set_cookie="tracker=1")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    monkeypatch.setattr(fetch, "LONGEST_WAIT", 0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    server.asked, server.over = collections.Counter(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.at = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def load(server, name, **settings):
    settings = SourceSettings(kind="csv", **(LIMITS | settings))
    return sources.load("csv", f"{server.at}/{name}", settings)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("ok", 1),
        ("broken-twice", 3),
        ("busy-once", 2),
        ("busy-for-long", 2),
        ("busy-for-nonsense", 2),
        ("cut-once", 2),
        ("moved", 1),
        ("moved-with-endless-body", 1),
    ],
)
def test_what_passes_is_tried_again_and_redirects_are_followed(server, name, times):
    assert load(server, name) == IMAGE
    assert server.asked[name.replace("-", "_")] == times


def test_what_a_server_asks_for_is_a_setting(server):
    assert load(server, "noai", fetch_respects=[]) == IMAGE
    assert load(server, "who", fetch_agent="me (me@example.org)") == IMAGE


@pytest.mark.parametrize(
    ("name", "reason", "times"),
    [
        ("missing", "fetch failed (404)", 1),
        ("broken", "fetch failed (500)", 3),
        ("stall", "fetch timed out", 3),
        ("stall-inside", "fetch timed out", 3),
        ("drip", "fetch timed out", 3),
        ("cut", "fetch cut short", 3),
        ("cut-chunks", "fetch cut short", 3),
        ("huge", "fetch failed (over 100000 bytes)", 1),
        ("endless", "fetch failed (over 100000 bytes)", 1),
        ("endless-chunks", "fetch failed (over 100000 bytes)", 1),
        ("moved-in-circles", "fetch failed (redirected over 5 times)", 6),
        ("moved-to-a-file", "fetch failed (not an http address)", 1),
        ("web-page", "fetch failed (a web page)", 1),
        ("noai", "fetch refused (X-Robots-Tag noai)", 1),
        ("who", "fetch failed (403)", 1),
        ("no-answer", "fetch failed (no connection)", 3),
        ("no-http", "fetch failed (no connection)", 3),
    ],
)
def test_a_server_that_fails_is_given_up_with_a_reason_to_count(server, name, reason, times):
    started = time.monotonic()
    with pytest.raises(OSError) as error:
        load(server, name)
    assert str(error.value) == f"{reason}: {server.at}/{name}"
    assert server.asked[name.replace("-", "_")] == times
    assert time.monotonic() - started < 3 * STALLS, "it waited for the server, not its own limit"


def test_a_body_is_what_its_length_says_and_the_rest_does_not_reach_the_next_one(server):
    assert load(server, "longer-than-said") == IMAGE[:100], "its decoder refuses it"
    assert [load(server, "ok") for _ in range(5)] == [IMAGE] * 5


def test_an_empty_body_and_an_image_called_html_are_handed_on(server):
    assert load(server, "empty") == b""
    assert load(server, "mislabelled") == b"\xff\xd8" + IMAGE


def test_a_server_that_is_busy_is_left_alone_for_as_long_as_it_says(server, monkeypatch):
    monkeypatch.setattr(fetch, "LONGEST_WAIT", 5.0)
    started = time.monotonic()
    load(server, "busy-once", fetch_timeout=5)
    assert 1.0 <= time.monotonic() - started < fetch.LONGEST_WAIT


def test_without_retries_there_is_one_try(server):
    with pytest.raises(OSError, match=r"fetch failed \(500\)"):
        load(server, "broken", fetch_retries=0)
    assert server.asked["broken"] == 1


def test_many_threads_fetch_at_once_over_kept_connections(server):
    names = ["ok", "missing", "moved", "cookie"] * 50

    def fetched(name):
        try:
            return load(server, name, fetch_timeout=20)
        except OSError as error:
            return str(error).split(":")[0]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(fetched, names))
    expected = {"missing": "fetch failed (404)"}
    assert found == [expected.get(name, IMAGE) for name in names]
    assert not fetch._SESSION.cookies, "those of a million hosts would pile up"


@pytest.mark.parametrize("url", ["http://", "https://[::bad/1.jpg", "HTTP://exa mple/1.jpg"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(OSError, match=r"fetch failed \(not an http address\)"):
        sources.load("csv", url, SourceSettings(**LIMITS))


def test_a_host_that_nobody_is_at_is_named():
    with pytest.raises(OSError, match=r"fetch failed \(no connection\): http://127.0.0.1:9/1.jpg"):
        sources.load("csv", "http://127.0.0.1:9/1.jpg", SourceSettings(fetch_retries=0))


def test_what_is_no_address_is_read_as_a_file(tmp_path):
    (tmp_path / "http.jpg").write_bytes(IMAGE)
    assert sources.load("folder", f"{tmp_path}/http.jpg", SourceSettings()) == IMAGE
