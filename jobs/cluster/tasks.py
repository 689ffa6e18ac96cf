"""Where the work runs: the one place that knows Ray.

With RAY_ADDRESS the cluster it names, else a small Ray of this machine's own.
"""

import logging
import math
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from jobs.cluster import joining
from jobs.cluster.common import Common, warm
from pipeline.errors import InputError, Unreachable
from pipeline.storage.plan import Piece

OBJECT_STORE_BYTES = 300 * 2**20  # results are small: bytes go to storage, not through Ray
WINDOW_PER_CPU = 4  # tasks handed to Ray ahead of those that run
GPU_SHARE = 1 / 4  # of a task: it keeps a processor as busy, with reading, decoding, tokenising
TRIES = 4  # of a piece whose worker, node or storage failed
PATIENCE = 120  # seconds until a node that does not start a task is given up
LOOK_SECONDS = 2  # between looks at which nodes there are

# Ray Train's controller looks at its workers every 2 s unless told, and a report waits for a look.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks that were given up
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


_own: set[str] = set()  # addresses of the Rays that this process started
Say = Callable[[str], None]
Made = TypeVar("Made")
_to_stderr = partial(print, file=sys.stderr, flush=True)


class WorkFailed(Exception):
    """A task or a training failed; the message names the piece, the cause is kept."""


class NodeFailed(Exception):
    """A node's disk, or its way to the storage, failed a task; another node may do better."""

    def __init__(self, node: str, host: str, reason: str):
        super().__init__(node, host, reason)
        self.node, self.host, self.reason = node, host, reason

    def __str__(self) -> str:
        return f"{self.reason} (on {self.host})"


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; once per process.

    Raises `InputError` within seconds where that cluster is gone, or is none.
    """
    import ray

    if ray.is_initialized():
        return
    _Nodes.alive, _Nodes.not_ready = {}, set()
    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if named := joining.address():
        joining.join(named, log_to_driver=False, logging_level=logging.WARNING)
    else:
        start_here()


def is_own() -> bool:
    """Whether the Ray that is joined was started by this process, for itself, on this machine."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().gcs_address in _own


def start_here(cpus: int | None = None, **options) -> None:
    """Start Ray on this machine: on all its processors, or as if it had so many."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # this Ray listens on loopback only
    # Ray adds 15 to its workers' niceness: beside any other program they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # It ends idle processes after a second where there are more than processors: the next stage
    # would import everything again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(24 * 3600 * 1000))
    ray.init(
        address="local",
        num_cpus=cpus,
        _node_ip_address="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        **options,
    )
    _own.add(ray.get_runtime_context().gcs_address)
    if ray.cluster_resources().get("GPU"):  # while the first stages need none of it
        ray.remote(warm).options(num_cpus=0, num_gpus=GPU_SHARE, max_retries=0).remote()


def fan_out(
    make: Callable[[Piece], dict],
    pieces: Iterable[Piece],
    *,
    gpu: bool = False,
    done: Callable[[Piece, dict], None] = lambda piece, summary: None,
    say: Say = _to_stderr,
) -> dict[str, dict]:
    """Summaries by piece name of `make(piece)` for all pieces, as Ray tasks.

    With `gpu` a task takes its share of a GPU where the cluster has one, for as long as it has
    one; a task that takes none sees none.

    At most a window of tasks is handed to Ray at a time. A piece whose worker, node or storage
    failed is made again, elsewhere if there is another node, and `say` tells so; any other error
    ends the whole, with the piece's name.
    """
    waiting = deque(pieces)
    if not waiting:  # a run with nothing to do starts nothing
        return {}
    import ray

    connect()
    nodes, common, task = _Nodes(waiting, gpu, say), Common(waiting), ray.remote(_task)
    tries: Counter[str] = Counter()
    running: dict[Any, Piece] = {}
    made: dict[str, dict] = {}
    while waiting or running:
        while waiting and len(running) < nodes.window():
            piece = waiting.popleft()
            pause = 2 ** tries[piece.name] - 1  # seconds: storage that is away may come back
            shown = f"{make.__name__} {piece.name}"  # in Ray's dashboard, in `ps`
            options = {"name": shown, **nodes.options(piece)}
            own = common.parted(piece)
            running[task.options(**options).remote(make, *own, pause, nodes.gpu)] = piece
        ready = _ended(running, LOOK_SECONDS if nodes.gpu else None)
        if not ready and nodes.without_gpu():  # what is asked for will never be there
            for other in running:
                ray.cancel(other, force=True)
            waiting.extendleft(running.values())
            running = {}
        for ended in ready:
            piece = running.pop(ended)
            try:
                made[piece.name] = ray.get(ended)
            except ray.exceptions.RayError as error:
                why, tries[piece.name] = nodes.passing(error), tries[piece.name] + 1
                if not why or tries[piece.name] == TRIES:
                    for other in running:
                        ray.cancel(other)
                    raise _explained(piece.name, error) from error
                again = f"it is made again, try {tries[piece.name] + 1} of {TRIES}"
                say(f"  {piece.name}: {why}; {again}")
                waiting.appendleft(piece)
                continue
            nodes.ended += 1
            done(piece, made[piece.name])
    return made


def _ended(running: dict[Any, Piece], patience: float | None = None) -> list:
    """All the tasks that have ended, after waiting for one, for so long at most (seconds).

    Asked for one at a time, each would cost a look at the whole window.
    """
    import ray

    if not ray.wait(list(running), num_returns=1, timeout=patience)[0]:
        return []
    return ray.wait(list(running), num_returns=len(running), timeout=0)[0]


def _task(
    make: Callable[[Piece], dict], piece: Piece, common: dict, pause: float, gpu: float
) -> dict:
    """What `make(piece)` gives; what fails because of this node says so."""
    import ray

    if not gpu:  # Ray lends none, but hides none either: all tasks of a node would fill it at once
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    time.sleep(pause)
    piece = replace(piece, inputs={**piece.inputs, **common})
    try:
        return make(piece)
    except (OSError, Unreachable) as error:  # bad images are none of these: they are rejected
        node = ray.get_runtime_context().get_node_id()
        raise NodeFailed(node, socket.gethostname(), str(error)) from error
    finally:
        if gpu:
            _hand_back()


def aside(work: Callable[[], Made]) -> Made:
    """What `work()` gives, by a process that has imported and loaded what it needs already.

    On the Ray of this very command, where the stages before left some; else, or where that fails,
    by this process.
    """
    if "ray" not in sys.modules or not is_own():
        return work()
    import ray

    share = GPU_SHARE if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(_called).options(name="page", num_gpus=share, max_retries=0)
    try:
        return ray.get(task.remote(work))
    except ray.exceptions.RayError:
        return work()


def _called(work: Callable[[], Made]) -> Made:
    return work()


def _hand_back() -> None:
    """Memory of the GPU that this process keeps for itself, to those that share it."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _nothing() -> None:
    return None


class _Nodes:
    """The cluster's nodes as the tasks of one stage see them: their room, and who failed."""

    alive: dict[str, dict] = {}  # of all stages together: who left between two is told, too
    not_ready: set[str] = set()  # of all stages together: who takes no task at all

    def __init__(self, pieces: Iterable[Piece], gpu: bool, say: Say):
        import ray

        self.say, self.failed, self.looked = say, set(), 0.0
        self.ended, self.rate = 0, math.inf  # tasks since the last look, and how many a second
        self.gpu = GPU_SHARE if gpu else 0
        self.here = ray.get_runtime_context().get_node_id()
        self._options: dict[tuple, dict] = {}
        self.look()
        if not self.able():
            self.gpu = 0
        self.largest = max((_bytes(piece) for piece in pieces), default=0)

    def look(self) -> None:
        """Count the nodes anew: they come and go."""
        import ray

        before, now = self.alive, time.monotonic()
        if self.ended or self.rate < math.inf:  # until one has ended the rate is not known
            self.rate = self.ended / max(now - self.looked, 1e-3)
        self.looked, self.ended, self._options = now, 0, {}
        _Nodes.alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for gone, node in enumerate(sorted(before.keys() - self.alive.keys()), 1):
            name, left = before[node]["NodeManagerHostname"], len(before) - gone
            self.say(f"  node {name} is lost, {left} left")
        if before and (new := self.alive.keys() - before.keys()):
            names = ", ".join(self.alive[node]["NodeManagerHostname"] for node in new)
            self.say(f"  node {names} has joined, {len(self.alive)} now")
        self.cpus = sum(node["Resources"].get("CPU", 0) for node in self.alive.values())

    def able(self) -> set[str]:
        """The nodes that have what a task takes."""
        wanted = ("CPU", "GPU") if self.gpu else ("CPU",)
        has = {node: about["Resources"] for node, about in self.alive.items()}
        return {node for node, room in has.items() if all(room.get(kind) for kind in wanted)}

    def without_gpu(self) -> bool:
        """Whether the last node that had a GPU is gone; from now on tasks take none."""
        self.look()
        if not self.gpu or self.able():
            return False
        self.gpu = 0
        self.say("  no node with a GPU is left; what is still to be made is made without")
        return True

    def window(self) -> int:
        """How many tasks Ray is handed at a time.

        Those that run and those that will have ended by the next look, one to three a CPU; their
        inputs fill half a store at most.
        """
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self.look()
        ahead = min(max(self.cpus, LOOK_SECONDS * self.rate), (WINDOW_PER_CPU - 1) * self.cpus)
        store = self.alive[self.here]["Resources"]["object_store_memory"]
        return max(1, int(min(self.cpus + ahead, store / 2 / max(1, self.largest))))

    def options(self, piece: Piece) -> dict[str, Any]:
        """Ray's options of a task: what it takes, and on which nodes it may run."""
        key = piece.memory, len(self.failed), len(self.not_ready)
        if key not in self._options:  # nodes are looked through once a look, not once a task
            self._options[key] = self._options_of(piece)
        return self._options[key]

    def _options_of(self, piece: Piece) -> dict[str, Any]:
        able = [n["Resources"] for n in self.alive.values() if n["Resources"].get("CPU")]
        mixed = len({"GPU" in resources for resources in able}) > 1
        largest = max((int(resources.get("memory", 0)) for resources in able), default=0)
        return {
            "num_cpus": 1,
            "num_gpus": self.gpu,
            "memory": min(piece.memory, largest) or None,
            "max_retries": 0,  # `fan_out` sees to it, and says so
            # Ray's own way keeps work without GPU off the nodes that have one; SPREAD does not.
            "scheduling_strategy": "DEFAULT" if mixed and not self.gpu else "SPREAD",
            "label_selector": self.left_out(),
        }

    def passing(self, error: Exception) -> str:
        """Why another try may do better, in words; '' where it would not."""
        import ray

        self.look()
        if isinstance(error, ray.exceptions.NodeDiedError):
            # Ray counts it as alive for half a minute yet, and would put the next try there.
            gone = re.findall(r"node ID: (\w+)", str(error))
            self.failed.update(gone)
            names = [self.alive[node]["NodeManagerHostname"] for node in gone if node in self.alive]
            return " ".join(["its node", *names, "was lost"])
        if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
            return self._not_ready(str(error))
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return "its worker took more memory than its node has left"
        if not isinstance(error, ray.exceptions.RayTaskError):
            lost = isinstance(error, ray.exceptions.WorkerCrashedError)
            return "its worker was lost" if lost else f"it was lost ({type(error).__name__})"
        if not isinstance(cause := error.cause, NodeFailed):
            return ""
        self.failed.add(cause.node)
        return str(cause)

    def _not_ready(self, said: str) -> str:
        """What kept a node from taking a task, in words; the node is left out from now on."""
        address = "".join(re.findall(r"\[Node ([^\]]+)\]", said)[:1])
        there = [n for n in self.alive.values() if n["NodeManagerAddress"] == address]
        self.not_ready.update(node["NodeID"] for node in there)
        names = ", ".join(node["NodeManagerHostname"] for node in there) or "its node"
        reasons = re.findall(r"^[\w.]*Error: (.+)$", said, re.MULTILINE)
        return f"{names} could not be made ready: {reasons[-1] if reasons else said[-200:]}"

    def left_out(self) -> dict[str, str] | None:
        """Ray's selector of the nodes that have not failed; None where no node is better."""
        failed = (self.failed | self.not_ready) & self.alive.keys()
        if not failed or self.able() <= failed:
            return None
        return {"ray.io/node-id": f"!in({','.join(sorted(failed))})"}

    def try_all(self) -> None:
        """Find the nodes that take no task at all, by one that does nothing on each."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task, tried, alive = ray.remote(_nothing), {}, self.alive
        for node in alive.keys() - self.not_ready if len(alive) > 1 else ():
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
            tried[node] = task.options(**options).remote()
        for node, answer in tried.items():
            try:
                ray.get(answer, timeout=PATIENCE)
            except ray.exceptions.RayError as error:
                self.failed.add(node)
                dead = isinstance(error, ray.exceptions.TaskUnschedulableError)  # not told as lost
                name = alive[node]["NodeManagerHostname"]
                why = f"{name} takes no task any more" if dead else self.passing(error) or error
                self.say(f"  {why}; the training leaves that node out")


def _bytes(piece: Piece) -> int:
    """What a task's inputs take in the object store, nearly."""
    return sum(getattr(value, "nbytes", 0) for value in piece.inputs.values())


def _explained(name: str, error: Exception) -> Exception:
    """The input error inside a Ray error, or a failure that names the piece and its first cause."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner  # Ray's errors hold in `cause` what the task raised
    if isinstance(cause, InputError):
        return InputError(f"{name}: {cause}")
    reason = " ".join(str(cause).split()) or "no message"
    return WorkFailed(f"{name} failed: {type(cause).__name__}: {reason[:500]}")
