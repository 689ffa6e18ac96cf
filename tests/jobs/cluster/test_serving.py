"""The search service on a cluster that others use too: a real head, and somebody else's service."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import requests

from tests.helpers import head as heads
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.own_cluster
THEIRS = """
import sys
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
def hello(request):
    return "theirs"

ray.init(address=sys.argv[1], log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(hello.bind(), name="theirs", route_prefix="/theirs")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[dict, str]]:
    """(environment, URL of Serve): a cluster on which somebody serves something already."""
    port = free_port()
    with heads.started(tmp_path_factory.mktemp("head"), cpus=4) as address:
        environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        subprocess.run(
            [sys.executable, "-c", THEIRS, address, str(port)],
            env=environment,
            check=True,
            timeout=600,
        )
        url = f"http://127.0.0.1:{port}"
        assert requests.get(f"{url}/theirs").text == "theirs"
        yield environment, url


def command(finished_run: str, *argv: str) -> list[str]:
    return [sys.executable, "-m", "jobs", "serve", "--root", finished_run, *argv]


@contextlib.contextmanager
def serving(finished_run, environment, tmp_path, *argv) -> Iterator[str]:
    """What `halftone serve` says, while it serves; then it gets a Ctrl-C."""
    log = tmp_path / f"serve-{len(list(tmp_path.iterdir()))}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(finished_run, *argv),
            env=environment,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            # Of tests that run in the background it would inherit that Ctrl-C is not heard.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        for _ in range(1200):
            if "metrics" in log.read_text():
                break
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        yield log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130, log.read_text()[-2000:]


def refused(finished_run, environment, *argv) -> str:
    """The sentence with which a second one ends."""
    tried = subprocess.run(
        command(finished_run, *argv),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert tried.returncode == 2 and "Traceback" not in tried.stderr, tried.stderr[-2000:]
    return tried.stderr


def test_beside_others_it_touches_its_own_application_alone(cluster, finished_run, tmp_path):
    environment, url = cluster
    port = free_port()
    with serving(finished_run, environment, tmp_path, "--serve.port", str(port)) as said:
        listens = f"listens at {url.removeprefix('http://')} already; --serve.host 127.0.0.1 and"
        assert listens in " ".join(said.split()) and f"--serve.port {port} are not used" in said
        assert f"{url}/healthz" in said and f":{port}/" not in said
        assert requests.get(f"{url}/healthz").json()["model"] == "main"
        sentence = refused(finished_run, environment)
        assert "serves the application 'halftone' at / (RUNNING, since 20" in sentence
        assert "give --replace to put this one in its place, or another --serve.application" in (
            sentence
        )
        sentence = refused(finished_run, environment, "--serve.application", "theirs")
        assert "serves the application 'theirs' at /theirs" in sentence
        other = ["--serve.application", "second"]
        with serving(finished_run, environment, tmp_path, *other) as said:
            assert f"{url}/second/" in said
            page = requests.get(f"{url}/second/").text
            for link in ('action="/second/"', 'src="/second/serve.js"', 'href="/second/?q='):
                assert link in page
            (hit,) = requests.get(f"{url}/second/search?q=a+boat&top=1").json()["hits"]
            picture = requests.get(f"{url}{hit['picture']}")
            assert (
                hit["picture"].startswith("/second/picture/") and picture.content[:2] == b"\xff\xd8"
            )
        assert requests.get(f"{url}/second/healthz").status_code != 200
        assert requests.get(f"{url}/healthz").ok
    assert requests.get(f"{url}/theirs").text == "theirs"
    assert requests.get(f"{url}/healthz").status_code == 404


def test_one_that_was_left_is_replaced_where_that_is_asked_for(cluster, finished_run, tmp_path):
    environment, url = cluster
    left = subprocess.Popen(
        command(finished_run),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with contextlib.suppress(requests.ConnectionError):
        for _ in range(1200):
            if requests.get(f"{url}/healthz").status_code == 200:
                break
            time.sleep(0.5)
    left.kill()
    left.wait(60)
    assert "--replace" in refused(finished_run, environment)
    with serving(finished_run, environment, tmp_path, "--replace"):
        assert requests.get(f"{url}/healthz").ok
    assert requests.get(f"{url}/theirs").text == "theirs"
    assert requests.get(f"{url}/healthz").status_code == 404
