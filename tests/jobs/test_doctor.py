"""The doctor: a planted fault for every check, on facts, on this machine and on two Ray nodes."""

import copy
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.cluster import examine, health
from pipeline.storage import store
from tests.helpers.paths import ROOT

GIB = 2**30
CHECKS = ["ray", "python", "packages", "code", "gpu", "memory", "/dev/shm", "disk", "open files"]
CHECKS += ["clock", "storage", "mlflow"]

MACHINE = {
    "ray": "2.60.0",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.6", "numba": None},
    "code": "abc",
    "gpu": {"there": 0, "names": [], "nccl": None, "torch": "2.13.0"},
    "cpus": 8,
    "memory": 32 * GIB,
    "shm": 16 * GIB,
    "disk": {"at": "/tmp", "free": 50 * GIB, "total": 100 * GIB},
    "open_files": 65536,
    "ray_cpus": 8.0,
    "ray_gpus": 0,
    "object_store": 8 * GIB,
    "clock": (0.001, 0.002),
    "storage_write": None,
    "storage_read": None,
    "read_from": "node-b",
    "mlflow": None,
}
DRIVER = {**MACHINE, "root": "s3://bucket/run", "mlflow_uri": "http://head:5000"}
GPUS = {"there": 2, "names": ["H200"] * 2, "nccl": "2.27.3", "torch": "2.13.0"}


def cluster(**faults) -> list[health.Line]:
    """The lines of three nodes, the second with faults."""
    machines = {f"node-{k}": copy.deepcopy(MACHINE) for k in "abc"}
    machines["node-b"] |= faults
    return health.lines(DRIVER, machines)


def test_a_healthy_cluster_is_a_line_a_check():
    lines = cluster()
    assert [line.check for line in lines] == CHECKS
    assert {line.level for line in lines} == {"ok"}
    assert {line.where for line in lines} == {"all 3 nodes"}
    assert not any(line.do for line in lines)


@pytest.mark.parametrize(
    ("check", "level", "said", "faults"),
    [
        ("ray", "fail", "2.55.0, the driver has 2.60.0", {"ray": "2.55.0"}),
        ("python", "warn", "3.11.9, the driver", {"python": "3.11.9"}),
        ("python", "fail", "3.12.7, the driver", {"python": "3.12.7"}),
        (
            "packages",
            "fail",
            "torch 2.12.0 (driver 2.13.0), numpy missing (driver 2.4.6)",
            {"packages": {"torch": "2.12.0", "numpy": None, "numba": None}},
        ),
        (
            "packages",
            "warn",
            "numba 0.61 (driver has none)",
            {"packages": MACHINE["packages"] | {"numba": "0.61"}},
        ),
        ("code", "fail", "another Halftone", {"code": "abd"}),
        ("gpu", "fail", "uses 0 of 2", {"gpu": MACHINE["gpu"] | {"there": 2}}),
        ("gpu", "fail", "uses 2 of 4", {"gpu": GPUS, "ray_gpus": 4}),
        ("gpu", "warn", "2 × H200, NCCL 2.27.3, Ray hands out 1", {"gpu": GPUS, "ray_gpus": 1.0}),
        ("memory", "warn", "4 GiB for 8 CPUs", {"memory": 4 * GIB}),
        ("/dev/shm", "warn", "holds 0.1 GiB, less than", {"shm": GIB // 16}),
        ("disk", "fail", "4 GiB free", {"disk": {"at": "/t", "free": 4 * GIB, "total": 90 * GIB}}),
        ("disk", "warn", "4 GiB free", {"disk": {"at": "/t", "free": 4 * GIB, "total": 9 * GIB}}),
        ("open files", "warn", "ulimit -n 4096", {"open_files": 4096}),
        ("open files", "fail", "ulimit -n 256", {"open_files": 256}),
        ("clock", "warn", "40 s behind", {"clock": (-40.1, 0.1)}),
        ("clock", "fail", "900 s ahead", {"clock": (900.2, 0.2)}),
        ("storage", "fail", "cannot write s3://bucket/run: no", {"storage_write": "no"}),
        ("storage", "fail", "what node-b wrote: it is not", {"storage_read": "it is not there"}),
        ("mlflow", "fail", "http://head:5000: refused", {"mlflow": "refused"}),
        ("node", "fail", "no answer", {"lost": "no answer within 120 s"}),
    ],
)
def test_a_fault_is_one_line_that_names_the_node_and_what_to_do(check, level, said, faults):
    wrong = [line for line in cluster(**faults) if line.level != "ok"]
    assert [(line.check, line.level, line.where) for line in wrong] == [(check, level, "node-b")]
    assert said in wrong[0].said and wrong[0].do


def test_a_slow_answer_is_no_wrong_clock():
    assert all(line.level == "ok" for line in cluster(clock=(3.0, 2.5)))


def test_nodes_with_gpus_must_have_one_nccl():
    machines = {k: {**MACHINE, "gpu": GPUS, "ray_gpus": 2.0} for k in "abc"}
    assert {line.level for line in health.lines(DRIVER, machines)} == {"ok"}
    machines["c"] = {**machines["c"], "gpu": GPUS | {"nccl": "2.21.5"}}
    wrong = [line for line in health.lines(DRIVER, machines) if line.level != "ok"]
    assert [(line.check, line.level, line.where) for line in wrong] == [("gpu", "fail", "c")]


def test_one_machines_mlflow_file_is_no_server_for_many():
    driver = {**DRIVER, "mlflow_uri": "sqlite:////home/me/mlflow.db"}
    (line,) = (x for x in health.lines(driver, {"a": MACHINE, "b": MACHINE}) if x.check == "mlflow")
    assert line.level == "warn" and "mlflow server" in line.do
    assert all(line.level == "ok" for line in health.lines(driver, {"a": MACHINE}))


def test_many_nodes_of_one_fault_are_one_line():
    machines = {f"node-{k}": {**MACHINE, "open_files": 4096} for k in range(1000)}
    machines["node-0"] = MACHINE
    lines = [line for line in health.lines(DRIVER, machines) if line.check == "open files"]
    assert [line.level for line in lines] == ["warn", "ok"]
    assert lines[0].where == "node-1, node-2, node-3 and 996 more"


# ---- what is tried -----------------------------------------------------------------------------


def test_what_one_writes_another_reads(folder):
    assert health.write_probe(folder, "a") is None
    assert health.read_probe(folder, "a") is None
    assert health.read_probe(folder, "b") == "it is not there"
    store.write_bytes(store.join(folder, "b"), b"else")
    assert health.read_probe(folder, "b") == "it holds other bytes"


def test_storage_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").touch()
    assert "file" in health.write_probe(str(tmp_path / "file"), "a")
    assert health.write_probe("zzz://bucket/run", "a")


@pytest.fixture
def server():
    """(URI, answers): a server that answers /health with the first of `answers`."""
    answers = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answers[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            """Says nothing."""

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", answers
    serving.shutdown()


def test_an_mlflow_server_answers_or_the_reason_is_told(server):
    uri, answers = server
    assert health.mlflow_probe(uri) is None and health.mlflow_probe(f"{uri}/") is None
    answers[0] = 403
    assert "403" in health.mlflow_probe(uri)
    assert "refused" in health.mlflow_probe("http://127.0.0.1:9")
    assert health.mlflow_probe("sqlite:////tmp/mlflow.db") is None


# ---- what a job would upload -------------------------------------------------------------------


def test_this_checkout_is_a_small_package():
    sizes = examine.upload(ROOT)
    assert {"jobs/cli/main.py", "pipeline/sharding/shard.py", "recipes/drawn.yaml"} <= set(sizes)
    assert not [name for name in sizes if name.startswith((".venv", ".git/", "runs", "mlruns"))]
    assert health.upload(sizes).level == "ok"


def test_data_in_the_folder_is_not_sent_and_what_is_large_is_named(tmp_path):
    for file in (".rayignore", ".gitignore"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for name in ("data/a.txt", "images/1.jpg", "shards/train-000000.tar", "jobs/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0")
    assert set(examine.upload(tmp_path)) == {".rayignore", ".gitignore", "jobs/a.py"}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "big.bin").write_bytes(bytes(12 * 2**20))
    line = health.upload(examine.upload(tmp_path))
    assert line.level == "warn" and "12.0 of them notes" in line.said
    assert health.upload({"notes/big.bin": 101 * 2**20}).level == "fail"


# ---- with Ray ----------------------------------------------------------------------------------


def doctored(capsys, *argv) -> tuple[int, dict]:
    """Exit code, and the lines by check."""
    code = 0
    try:
        main.main("doctor", [*argv, "--json"])
    except SystemExit as stop:
        code = stop.code
    return code, {line["check"]: line for line in json.loads(capsys.readouterr().out)}


def test_this_machine_is_looked_at_and_nothing_is_left_behind(ray_here, tmp_path, capsys):
    code, lines = doctored(capsys, "--root", str(tmp_path / "run"))
    assert set(lines) >= set(CHECKS)
    for check in ("ray", "python", "packages", "code", "clock", "storage", "mlflow"):
        assert lines[check]["level"] == "ok", lines[check]
    assert code == any(line["level"] == "fail" for line in lines.values())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_root_that_cannot_be_written_fails(ray_here, tmp_path, capsys, monkeypatch, server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    server[1][0] = 500
    code, lines = doctored(capsys, "--root", "zzz://nowhere/run")
    assert code == 1 and lines["storage"]["level"] == lines["mlflow"]["level"] == "fail"
    assert "cannot write zzz://nowhere/run" in lines["storage"]["said"]
    assert "500" in lines["mlflow"]["said"]


@pytest.mark.own_cluster
def test_two_nodes_that_share_no_storage(tmp_path):
    """Real nodes; memory:// is a store of one process, and the second may open few files."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
    }
    common = ["--num-cpus=1", "--object-store-memory=100000000", "--block"]
    head = ["--head", "--port=24679", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    head += ["--temp-dir", f"/tmp/halftone-doctor-{os.getpid()}"]
    start = f"{binaries / 'ray'} start"
    few = f"ulimit -n 4096; exec {start} --address=127.0.0.1:24679 {' '.join(common)}"
    commands = [f"exec {start} {' '.join(head + common)}", few]
    running = []
    try:
        for command in commands:
            file = tmp_path / f"node-{len(running)}.log"
            with file.open("w") as log:
                node = subprocess.Popen(
                    ["bash", "-c", command],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            running.append(node)
            _until_started(file)
        doctor_ = subprocess.run(
            [sys.executable, "-m", "jobs.doctor", "--root", "memory://run"],
            env={**environment, "RAY_ADDRESS": "127.0.0.1:24679"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    finally:
        for node in reversed(running):
            os.killpg(node.pid, signal.SIGTERM)
            try:
                node.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
    assert doctor_.returncode == 1, doctor_.stderr[-2000:]
    lines = {line[5:16].strip(): line for line in doctor_.stdout.splitlines()}
    assert lines["storage"].startswith("fail") and "it is not there" in lines["storage"]
    assert "all nodes share" in lines["storage"]
    assert "all 2 nodes" in lines["ray"] and lines["clock"].startswith("ok")


def _until_started(log: Path) -> None:
    for _ in range(1200):
        if "Ray runtime started" in log.read_text():
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-1500:])


def test_a_cluster_that_does_not_answer_is_a_line(tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    tried = subprocess.run(
        [sys.executable, "-m", "jobs.doctor", "--root", str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert tried.returncode == 1 and "Traceback" not in tried.stderr
    assert tried.stdout.startswith("fail ray        127.0.0.1:9")
