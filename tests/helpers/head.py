"""A head of a cluster of one's own, by `ray start`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TRIES = 3  # on a busy machine Ray gives its own start up after half a minute


@contextlib.contextmanager
def started(folder: Path, cpus: int) -> Iterator[str]:
    """HOST:PORT of a head that runs while the block does."""
    for attempt in range(TRIES):
        port, log = _free_port(), folder / f"head-{attempt}.log"
        head = _start(port, cpus, log)
        try:
            if _is_up(head, log):
                yield f"127.0.0.1:{port}"
                return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGTERM)
                try:
                    head.wait(120)
                except subprocess.TimeoutExpired:
                    os.killpg(head.pid, signal.SIGKILL)
    raise AssertionError(log.read_text()[-1500:])


def _start(port: int, cpus: int, log: Path) -> subprocess.Popen:
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": "120",
    }
    command = [str(binaries / "ray"), "start", "--head", f"--port={port}", f"--num-cpus={cpus}"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--block"]
    command += ["--object-store-memory=100000000", f"--temp-dir=/tmp/halftone-{port}-{os.getpid()}"]
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def _is_up(head: subprocess.Popen, log: Path) -> bool:
    for _ in range(1200):
        if "Ray runtime started" in log.read_text():
            return True
        if head.poll() is not None:
            return False
        time.sleep(0.5)
    return False


def _free_port() -> int:
    """Below those that Ray gives its workers."""
    for port in range(7000 + os.getpid() % 1000, 9900):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
