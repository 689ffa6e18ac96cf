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


@contextlib.contextmanager
def started(folder: Path, cpus: int) -> Iterator[str]:
    """HOST:PORT of a head that runs while the block does."""
    port = _free_port()
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [str(binaries / "ray"), "start", "--head", f"--port={port}", f"--num-cpus={cpus}"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--block"]
    command += ["--object-store-memory=100000000", f"--temp-dir=/tmp/halftone-{port}-{os.getpid()}"]
    log = folder / f"head-{port}.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(1200):
            if "Ray runtime started" in log.read_text():
                break
            assert head.poll() is None, log.read_text()[-1500:]
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def _free_port() -> int:
    """Below those that Ray gives its workers."""
    for port in range(7000 + os.getpid() % 1000, 9900):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
