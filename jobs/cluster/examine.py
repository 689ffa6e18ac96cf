"""Every node of the cluster looked at from within, by an actor of its own."""

import contextlib
import logging
import time
import uuid
from pathlib import Path

from jobs.cluster import health, tasks
from pipeline.storage import store

PATIENCE = 120  # seconds until a node that says nothing is given up
PINGS = 5
LOG = logging.getLogger(__name__)


class Examiner:
    """What one node says of itself."""

    def __init__(self):
        store.WAITS = ()  # type: ignore[assignment]  # storage that does not answer is a finding, in this process of its own

    def now(self) -> float:
        return time.time()

    facts = staticmethod(health.facts)
    write = staticmethod(health.write_probe)
    read = staticmethod(health.read_probe)
    mlflow = staticmethod(health.mlflow_probe)


def examine(root: str, mlflow_uri: str) -> dict[str, dict]:
    """Facts of every node by its name; {"lost": why} of a node that could not be looked at."""
    tasks.connect()
    import ray

    # By address; several nodes of one machine are told apart by their ids.
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = {f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": node for node in alive}
    examiners = {name: _examiner(node) for name, node in nodes.items()}
    found = _answers({name: e.facts.remote() for name, e in examiners.items()})
    machines = {name: value if ok else {"lost": value} for name, (value, ok) in found.items()}
    names = [name for name, (_, ok) in found.items() if ok]
    seen = {name: examiners[name] for name in names}
    folder = store.join(root, f".doctor-{uuid.uuid4().hex[:12]}")
    beside = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    try:
        written = {n: e.write.remote(folder, n) for n, e in seen.items()}
        tracked = {n: e.mlflow.remote(mlflow_uri) for n, e in seen.items()}
        _note(machines, "storage_write", written)
        _note(machines, "mlflow", tracked)
        read = {n: e.read.remote(folder, beside[n]) for n, e in seen.items()}
        _note(machines, "storage_read", read)
    finally:
        with contextlib.suppress(Exception):  # a folder that cannot be written was said already
            store.remove(folder)
    resources = {"ray_cpus": "CPU", "ray_gpus": "GPU", "object_store": "object_store_memory"}
    for name, examiner in seen.items():
        lent = nodes[name]["Resources"]
        machines[name] |= {key: lent.get(resource, 0) for key, resource in resources.items()}
        machines[name] |= {"read_from": beside[name], "clock": _clock(examiner)}
    return machines


def upload(folder: str) -> dict[str, int]:
    """Bytes of the files that `ray job submit --working-dir` would send from a folder, by name."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    home, sizes = Path(folder).absolute(), {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(home))] = path.stat().st_size

    excludes = [packaging._get_excludes(home, ray_constants.get_runtime_env_default_excludes())]
    packaging._dir_travel(home, excludes, add, include_gitignore=True, logger=LOG)
    return sizes


def _examiner(node: dict):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0)(Examiner).options(scheduling_strategy=pinned).remote()


def _answers(asked: dict) -> dict[str, tuple]:
    """(answer, True), or (why there is none, False), by node; all wait together."""
    import ray

    ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
    out = {}
    for name, answer in asked.items():
        try:
            out[name] = ray.get(answer, timeout=0.1), True
        except ray.exceptions.GetTimeoutError:
            out[name] = f"no answer within {PATIENCE} s", False
        except ray.exceptions.RayError as error:
            out[name] = str(error).strip().splitlines()[-1][:300], False
    return out


def _note(machines: dict[str, dict], key: str, asked: dict) -> None:
    """Put the answers under a key; a node that is lost meanwhile answers with the reason."""
    for name, (answer, _) in _answers(asked).items():
        machines[name][key] = answer


def _clock(examiner) -> tuple[float, float]:
    """Seconds the node's clock is ahead of this one, and how far off that may be."""
    import ray

    tries = []
    for _ in range(PINGS):
        asked = time.time()
        there = ray.get(examiner.now.remote(), timeout=PATIENCE)
        answered = time.time()
        tries.append((answered - asked, there - (asked + answered) / 2))
    trip, ahead = min(tries)
    return ahead, trip / 2
