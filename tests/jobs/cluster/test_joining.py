"""The cluster of RAY_ADDRESS: told in a sentence where there is none, or it is another's."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from jobs.cluster import joining
from pipeline.errors import InputError
from tests.helpers import head as heads
from tests.helpers.paths import ROOT
from tests.helpers.stages import SCENES

INGEST = ["ingest", "--recipe", "drawn_tiny"]
INGEST += [word for key, value in SCENES.items() for word in (f"--source.{key}", str(value))]


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:9", "nobody listens at 127.0.0.1:9 .*start the head, correct the address"),
        ("[::1]:9", r"nobody listens at \[::1\]:9"),
        ("no.such.host.invalid:6379", "nobody listens at no.such.host.invalid:6379"),
        ("127.0.0.1:99999", "nobody listens at 127.0.0.1:99999"),
        ("head", "'head' is no address; give HOST:PORT of the head, or auto"),
        ("head:6379/x", "is no address"),
        ("http://head:8265", "takes jobs, .*--address http://head:8265 .*or give head:6379"),
        ("https://head", "takes jobs, .*or give head:6379"),
        (
            "ray://head:10001",
            "of ray://, which .*with head:6379, or `ray job submit --address http",
        ),
    ],
)
def test_an_address_of_nobody_is_told(address, sentence):
    with pytest.raises(InputError, match=f"RAY_ADDRESS .*{sentence}"):
        joining.join(address)


@pytest.fixture(params=["silent", "web"])
def stranger(request):
    """Address of somebody who listens and is no head."""
    if request.param == "web":
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_who_listens_and_is_no_head_is_told(stranger):
    with pytest.raises(InputError, match=f"{stranger} is no head of Ray's, or does not answer"):
        joining.join(stranger)


def test_without_an_address_ray_is_this_machines_own(monkeypatch):
    for name in ("", " ", "local"):
        monkeypatch.setenv("RAY_ADDRESS", name)
        assert joining.address() is None
    monkeypatch.setenv("RAY_ADDRESS", " head:6379 ")
    assert joining.address() == "head:6379"


def run(tmp_path, address: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *argv, "--root", str(tmp_path / "run")],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.own_cluster
@pytest.mark.parametrize("command", [INGEST, ["run", *INGEST[1:]]])
def test_a_stage_says_at_once_that_its_cluster_is_gone(tmp_path, command):
    tried = run(tmp_path, "127.0.0.1:9", *command)
    assert tried.returncode == 2 and "Traceback" not in tried.stderr
    assert "RAY_ADDRESS 127.0.0.1:9: nobody listens" in tried.stderr


@pytest.mark.own_cluster
def test_a_cluster_is_joined_and_one_of_other_versions_is_told(tmp_path):
    with heads.started(tmp_path, cpus=1) as address:
        assert run(tmp_path, address, *INGEST).returncode == 0
        # As a head of another Ray and Python would have it.
        wrote = subprocess.run(
            [sys.executable, "-c", OTHER, address], capture_output=True, text=True
        )
        assert wrote.returncode == 0, wrote.stderr
        tried = run(tmp_path, address, *INGEST, "--source.seed", "7")
        assert tried.returncode == 2 and "Traceback" not in tried.stderr
        assert "the cluster has Ray 2.9.0 and Python 3.9.1, this process Ray" in tried.stderr
        looked = run(tmp_path, address, "doctor", "--json")
        (line,) = (x for x in json.loads(looked.stdout) if x["check"] == "ray")
        assert line["level"] == "fail" and "the cluster has Ray 2.9.0" in line["said"]
    tried = run(tmp_path, address, *INGEST, "--source.seed", "8")
    assert tried.returncode == 2 and f"nobody listens at {address}" in tried.stderr


OTHER = """
import json, sys
from ray._common.usage import usage_constants
from ray._private import ray_constants
from ray._raylet import GcsClient
gcs = GcsClient(address=sys.argv[1])
where = {"namespace": ray_constants.KV_NAMESPACE_CLUSTER}
about = json.loads(gcs.internal_kv_get(usage_constants.CLUSTER_METADATA_KEY, **where))
about |= {"ray_version": "2.9.0", "python_version": "3.9.1"}
gcs.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, json.dumps(about).encode(), True, **where)
"""
