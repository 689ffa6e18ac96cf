"""Several machines on this one: Ray nodes in Linux namespaces, cabled to a switch.

Every node has its own network address, processes, host name, /dev/shm, and its own HOME and
temporary folder, which have the same name on every node and are not the same folders. Nodes share
the installed software and nothing else; run folders live on an S3 server at the switch. It needs
root. All that is made belongs to processes, and goes with them: the kernel ends them even where
this process is killed.
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
HOME = "/mnt"  # of every node, each with another folder there
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
PORTS = {"ray": 6379, "dashboard": 8265, "mlflow": 5000, "s3": 9000}
START = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount {disk} {home}
mkdir -p {home}/tmp
ip link set lo up
read -r plugged_in
{command}
exec sleep infinity
"""


@functools.cache
def why_not() -> str:
    """Why there can be no namespaces here; '' where there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"network namespaces need {', '.join(missing)}"
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", "mount -t tmpfs none /mnt && ip link add bridge type bridge"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    return ""


_DIES_WITH_ME = ["setpriv", "--pdeathsig", "KILL"]
_UNSHARE = [
    *(*_DIES_WITH_ME, "unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork"),
    *("--kill-child=KILL", "--mount-proc"),
]


class Machine:
    """Processes with a network, a process table and folders of their own."""

    def __init__(self, name: str, address: str, folder: Path, environment: dict[str, str]):
        self.name, self.address, self.folder = name, address, folder
        self.environment = environment
        self.outer: psutil.Popen | None = None  # makes the namespaces and waits
        self.inner: psutil.Process | None = None  # the first process inside

    def start(self, command: str, disk_mb: int | None = None) -> None:
        """Begin to be; `command` starts once the machine is `plugged_in`."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        names = f"127.0.0.1 localhost\n{self.address} {self.name}\n"
        (self.folder / "hosts").write_text(names)
        disk = f"-t tmpfs -o size={disk_mb}m tmpfs" if disk_mb else f"--bind {home}"
        script = START.format(
            name=self.name, folder=self.folder, disk=disk, home=HOME, command=command
        )
        with self.log.open("ab") as log:
            self.outer = psutil.Popen(
                [*_UNSHARE, "sh", "-c", script],
                **{"stdin": subprocess.PIPE, "stdout": log, "stderr": log},
                cwd=ROOT,
                env=self.environment,
            )
        wait_for(self.outer.children, f"{self.name} to start", 60)
        self.inner = self.outer.children()[0]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def plugged_in(self) -> None:
        self.outer.stdin.write(b"\n")
        self.outer.stdin.close()

    def inside(self, *words: str) -> list[str]:
        """The command that runs these words on this machine."""
        entered = ["nsenter", "-t", str(self.inner.pid), "-n", "-m", "-u", "-i", "-p"]
        return [*entered, f"--wdns={ROOT}", "--", *words]

    def popen(self, *words: str, **options) -> psutil.Popen:
        command = [*_DIES_WITH_ME, *self.inside(*words)]
        return psutil.Popen(command, env=self.environment, **options)

    def ip(self, *words: str) -> None:
        """`ip …` in this machine's network."""
        subprocess.run(["nsenter", "-t", str(self.inner.pid), "-n", "ip", *words], check=True)

    def kill(self) -> None:
        """Power off: the first process is killed, and with it, by the kernel, all others."""
        if self.outer is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            (self.inner or self.outer).kill()
        self.outer.wait(60)


class Namespaces:
    """A head, worker nodes and an S3 server, each a machine; nodes are called node-1 (the head) on.

    with Namespaces(3) as cluster:
        job = cluster.submit("python", "-m", "jobs.end_to_end", …, "--root", cluster.bucket + "/x")
        cluster.kill(cluster.nodes["node-3"])
    """

    def __init__(self, nodes: int = 3, cpus: int = 1):
        self.count, self.cpus = nodes, cpus
        self.nodes: dict[str, Machine] = {}
        self.started = 0
        self.network = _free_network()
        self.bucket = "s3://halftone"

    def __enter__(self) -> "Namespaces":
        self.folder = Path(tempfile.mkdtemp(prefix="halftone-nodes-"))
        try:
            self._start_switch()
            for _ in range(self.count):
                self.add_node(wait=False)
            nodes = self.nodes.values()
            wait_for(lambda: all(map(self._has_joined, nodes)), f"{self.count} nodes", 400)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for machine in [*self.nodes.values(), self.switch]:
            machine.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def head(self) -> Machine:
        return self.nodes["node-1"]

    @property
    def environment(self) -> dict[str, str]:
        """What processes that use the cluster's storage need."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.network}.254:{PORTS['s3']}",
            **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def add_node(self, *, gpus: int = 0, disk_mb: int | None = None, wait: bool = True) -> Machine:
        """One more node; with `disk_mb` its disk is that small."""
        self.started += 1
        name, address = f"node-{self.started}", f"{self.network}.{self.started}"
        node = Machine(name, address, self.folder / name, self._node_environment())
        first = not self.nodes
        self.nodes[name] = node
        where = (
            f"--head --port={PORTS['ray']} --dashboard-host=0.0.0.0"
            if first
            else f"--address={self.head.address}:{PORTS['ray']}"
        )
        node.start(
            f"ray start {where} --node-ip-address={address} --num-cpus={self.cpus} "
            f"--num-gpus={gpus} --object-store-memory=100000000 --temp-dir={HOME}/ray "
            "--disable-usage-stats",
            disk_mb,
        )
        self._plug_in(node)
        if first or wait:
            wait_for(lambda: self._has_joined(node), f"{name} to join", 400)
        return node

    def _has_joined(self, node: Machine) -> bool:
        assert node.outer.poll() is None, f"{node.name} ended: {node.log.read_text()[-2000:]}"
        return node.address in self.alive()

    def kill(self, node: Machine) -> None:
        node.kill()
        del self.nodes[node.name]

    def cut(self, node: Machine) -> None:
        """The node's cable is pulled out."""
        self.switch.ip("link", "set", node.name, "down")

    def heal(self, node: Machine) -> None:
        self.switch.ip("link", "set", node.name, "up")

    def submit(self, *words: str, log: Path | None = None) -> psutil.Popen:
        """`ray job submit` of a command, on the head, from a copy of this checkout."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if log is not None:
            options = {"stdout": log.open("ab"), "stderr": subprocess.STDOUT}
        address = f"http://{self.head.address}:{PORTS['dashboard']}"
        return self.head.popen(
            *("ray", "job", "submit", "--address", address, "--working-dir", str(ROOT)),
            *("--", *words),
            **options,
        )

    def start_mlflow(self) -> psutil.Popen:
        """An MLflow server on the head with its database there; the process, to be killed."""
        server = self.head.popen(
            *("mlflow", "server", "--host", "0.0.0.0", "--port", str(PORTS["mlflow"])),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{HOME}/mlflow.db"),
            *("--artifacts-destination", f"{HOME}/mlflow-artifacts", "--allowed-hosts", "*"),
            **{"stdout": self.head.log.open("ab"), "stderr": subprocess.STDOUT},
        )
        wait_for(lambda: _answers(f"{self.mlflow}/health"), "MLflow to answer", 180)
        return server

    @property
    def mlflow(self) -> str:
        return f"http://{self.network}.1:{PORTS['mlflow']}"

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray counts as alive."""
        url = f"http://{self.head.address}:{PORTS['dashboard']}/nodes?view=summary"
        if not (page := _answers(url)):
            return set()
        summaries = json.loads(page)["data"]["summary"]
        alive = (s for s in summaries if s.get("raylet", {}).get("state") == "ALIVE")
        return {summary["ip"] for summary in alive if "ip" in summary}

    def _node_environment(self) -> dict[str, str]:
        kept = {k: os.environ[k] for k in ("LANG", "HF_HUB_OFFLINE") if k in os.environ}
        return {
            **kept,
            **self.environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **{"HOME": HOME, "TMPDIR": f"{HOME}/tmp", "OMP_NUM_THREADS": "1"},
            **{"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true"},
            **{"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONUNBUFFERED": "1"},
            "RAY_worker_niceness": "0",  # Ray gives way to all else on a machine, and would wait
        }

    def _start_switch(self) -> None:
        """The bridge with the S3 server, and this process cabled to it."""
        address = f"{self.network}.254"
        environment = {**os.environ, **self.environment}
        self.switch = Machine("switch", address, self.folder / "switch", environment)
        self.switch.start(f"{sys.executable} -m moto.server -H 0.0.0.0 -p {PORTS['s3']}")
        # Without an address of its own a bridge takes a cable's, and another one when that cable
        # is gone: nobody who knew the old one reaches it then, for half a minute and more.
        self.switch.ip("link", "add", "bridge", "address", "02:00:00:00:00:01", "type", "bridge")
        self.switch.ip("addr", "add", f"{address}/24", "dev", "bridge")
        self.switch.ip("link", "set", "bridge", "up")
        mine = f"halftone-{self.network.split('.')[2]}"
        self._cable("tester", mine, os.getpid())
        for words in (
            ("addr", "add", f"{self.network}.253/24", "dev", mine),
            ("link", "set", mine, "up"),
        ):
            subprocess.run(["ip", *words], check=True)
        self.switch.plugged_in()
        endpoint = self.environment["AWS_ENDPOINT_URL"]
        wait_for(lambda: _answers(endpoint), "the S3 server", 120)
        bucket = endpoint + self.bucket.removeprefix("s3:/")
        urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=10).close()

    def _plug_in(self, node: Machine) -> None:
        self._cable(node.name, "eth0", node.inner.pid)
        node.ip("addr", "add", f"{node.address}/24", "dev", "eth0")
        node.ip("link", "set", "eth0", "up")
        node.plugged_in()

    def _cable(self, here: str, there: str, pid: int) -> None:
        """A cable between the switch and the machine of a process, by its ends' names."""
        self.switch.ip(
            *("link", "add", here, "type", "veth", "peer", "name", there, "netns", str(pid))
        )
        self.switch.ip("link", "set", here, "master", "bridge", "up")


def _free_network() -> str:
    """The first three numbers of addresses that nobody uses here."""
    used = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True).stdout
    first = os.getpid() % 250
    return next(
        network
        for shift in range(250)
        if f"{(network := f'10.213.{(first + shift) % 250}')}." not in used
    )


def _answers(url: str) -> str:
    """What a GET says; '' where nothing does."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as page:
        return page.read().decode() or " "
    return ""


def wait_for(condition, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
