"""The whole run as a job on several nodes with an object store alone, one of them killed."""

import pytest
from s3fs import S3FileSystem

from pipeline.storage import store
from tests.helpers.namespaces import Namespaces, wait_for, why_not
from tests.helpers.stages import TINY

WHY = why_not()
pytestmark = [
    pytest.mark.own_cluster,
    pytest.mark.skipif(bool(WHY), reason=WHY or "namespaces are allowed"),
]
SAME_BYTES = ("1-manifest", "2-shards", "3-embeddings/tiny")


def hashes(root: str, stage: str) -> dict[str, str]:
    """sha256 of every file directly in a stage's folder, by name."""
    folder = store.join(root, stage)
    names = store.list_files(folder)
    return {name: store.sha256(store.read_bytes(store.join(folder, name))) for name in names}


@pytest.fixture
def other_endpoints():
    """Other S3 servers than the tests' own: a file system keeps the one of its first use."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.timeout(3600)  # two minutes on a machine with nothing else to do
def test_a_job_on_two_nodes_of_which_one_dies_gives_what_one_machine_gives(
    finished_run, tiny_encoder, tmp_path, monkeypatch, other_endpoints
):
    log = tmp_path / "job.txt"
    with Namespaces(2) as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        root = f"{cluster.bucket}/tiny"
        command = ("jobs.end_to_end", *TINY, "--encoder", tiny_encoder, "--root", root)
        job = cluster.submit("python", "-m", *command, log=log)
        wait_for(lambda: "3 embed" in log.read_text() or job.poll() is not None, "embed", 1200)
        cluster.kill(cluster.nodes["node-2"])
        assert job.wait(1800) == 0, log.read_text()[-3000:]
        assert "node-2 is lost" in log.read_text() or "node-2 was lost" in log.read_text()
        for stage in SAME_BYTES:
            assert hashes(root, stage) == hashes(finished_run, stage)
        for stage in ("6-rankings", "8-reranked"):
            here, there = (
                store.read_json(store.join(folder, stage, "main", "metrics.json"))["metrics"]
                for folder in (root, finished_run)
            )
            assert here == there
