"""What the machines of a cluster are like, and what of it stands in the way of a run.

Facts are gathered on every machine; a check compares a machine's facts with the driver's.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.storage import probe, store

PACKAGES = (  # whose versions change bytes, numbers or what can be read
    *("torch", "numpy", "pyarrow", "pillow", "scikit-learn", "safetensors", "pydantic", "fsspec"),
    *("sentence-transformers", "transformers", "tokenizers", "webdataset", "mlflow"),
)
OPTIONAL = ("numba", "s3fs", "gcsfs", "faiss-cpu", "peft")
GIB = 2**30
UPLOAD_LIMIT = 100 * 2**20  # Ray's
UPLOAD_LARGE = 10 * 2**20  # Halftone itself is 2 MB
ORDER = ("fail", "warn", "ok")


class Verdict(NamedTuple):
    """What a check says of one machine."""

    level: str  # ok, warn or fail
    said: str
    do: str = ""


class Line(NamedTuple):
    """The machines of which a check says the same."""

    level: str
    check: str
    where: str
    said: str
    do: str


# ---- facts -------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What this machine is like, in bytes and counts."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    return {
        "ray": _version("ray"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "code": _code(),
        "gpu": _gpus(),
        "cpus": os.cpu_count(),
        "memory": _memory(),
        "shm": shm,
        "disk": {"at": tempfile.gettempdir(), "free": disk.free, "total": disk.total},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).split("+")[0]  # +cpu and +cu130 are one version
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """Hash of Halftone's own files as this process imports them."""
    root = Path(__file__).parents[2]
    files = sorted(f for package in ("schemas", "pipeline") for f in (root / package).rglob("*.py"))
    return store.fingerprint([[str(f.relative_to(root)), f.read_text()] for f in files])


def _gpus() -> dict[str, Any]:
    """GPUs of the machine, those that torch can use, and the version of NCCL."""
    import torch

    driver = Path("/proc/driver/nvidia/gpus")
    there = len(list(driver.iterdir())) if driver.is_dir() else 0
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "there": max(there, usable),
        "names": [torch.cuda.get_device_name(i) for i in range(usable)],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if usable else None,
        "torch": torch.__version__,
    }


def _memory() -> int:
    """Bytes this process may use: the machine's, or its container's."""
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.is_file() else "max"
    whole = psutil.virtual_memory().total
    return whole if given == "max" else min(whole, int(given))


# ---- what is tried -----------------------------------------------------------------------------


def write_probe(folder: str, name: str) -> str | None:
    """Why this machine cannot write a file of the folder; None where it can."""
    return _why_not(probe.write, folder, name)


def read_probe(folder: str, name: str) -> str | None:
    """Why this machine does not read what `write_probe` wrote elsewhere; None where it does."""
    return _why_not(probe.read, folder, name)


def _why_not(tried: Callable[[str, str], None], folder: str, name: str) -> str | None:
    try:
        tried(folder, name)
    except Exception as error:  # the stores' libraries have no common base
        return _reason(error)
    return None


def mlflow_probe(uri: str) -> str | None:
    """Why the MLflow server does not answer this machine; None where it does, or is a file."""
    if not uri.startswith("http"):
        return None
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
            answer.read(100)
    except urllib.error.HTTPError as error:
        return f"it answers {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


# ---- checks: of a machine's facts `m` against the driver's `d` -----------------------------------


def _ray(m: dict, d: dict) -> Verdict:
    if m["ray"] != d["ray"]:
        return Verdict("fail", f"{m['ray']}, the driver has {d['ray']}", f"install {d['ray']}")
    return Verdict("ok", m["ray"])


def _python(m: dict, d: dict) -> Verdict:
    if m["python"] == d["python"]:
        return Verdict("ok", m["python"])
    level = "fail" if m["python"].split(".")[:2] != d["python"].split(".")[:2] else "warn"
    said = f"{m['python']}, the driver has {d['python']}"
    return Verdict(level, said, "use one image, or one environment, on all nodes")


def _packages(m: dict, d: dict) -> Verdict:
    other = [name for name in m["packages"] if m["packages"][name] != d["packages"][name]]
    if not other:
        return Verdict(
            "ok", f"{sum(v is not None for v in m['packages'].values())} as the driver's"
        )
    said = ", ".join(
        f"{n} {m['packages'][n] or 'missing'} (driver {d['packages'][n] or 'has none'})"
        for n in other
    )
    level = "fail" if set(other) & set(PACKAGES) else "warn"
    return Verdict(level, said, "install the same on every node (-c constraints.txt)")


def _same_code(m: dict, d: dict) -> Verdict:
    if m["code"] == d["code"]:
        return Verdict("ok", "the driver's")
    return Verdict(
        "fail",
        "another Halftone than the driver's",
        "submit the job with --working-dir ., or install one version on every node",
    )


def _gpu(m: dict, d: dict) -> Verdict:
    gpu, lent = m["gpu"], m.get("ray_gpus", 0)
    if not gpu["there"] and not lent:
        return Verdict("ok", "none")
    usable = len(gpu["names"])
    if usable < max(gpu["there"], lent):
        said = f"torch {gpu['torch']} uses {usable} of {max(gpu['there'], lent):g}"
        return Verdict("fail", said, "install torch built for the node's CUDA driver")
    said = f"{usable} × {gpu['names'][0]}, NCCL {gpu['nccl']}"
    if gpu["nccl"] != (d["nccl"] or gpu["nccl"]):
        return Verdict("fail", f"{said}, others have {d['nccl']}", "install the same torch")
    if lent < usable:
        do = "start Ray on the node with --num-gpus, or let it count them itself"
        return Verdict("warn", f"{said}, Ray hands out {lent:g}", do)
    return Verdict("ok", said)


def _shm(m: dict, d: dict) -> Verdict:
    said = f"/dev/shm holds {m['shm'] / GIB:.1f} GiB"
    if m["shm"] < m.get("object_store", 0):
        do = "give the container a larger one (docker --shm-size, an emptyDir of medium Memory)"
        return Verdict("warn", f"{said}, less than Ray's object store; Ray uses the disk", do)
    return Verdict("ok", said)


def _memory_per_cpu(m: dict, d: dict) -> Verdict:
    cpus = m.get("ray_cpus") or m["cpus"]
    said = f"{m['memory'] / GIB:.0f} GiB for {cpus:g} CPUs"
    if m["memory"] < cpus * GIB:
        do = f"start Ray on the node with --num-cpus {max(1, int(m['memory'] / GIB))}"
        return Verdict("warn", f"{said}; a task takes about 1 GiB", do)
    return Verdict("ok", said)


def _disk(m: dict, d: dict) -> Verdict:
    disk = m["disk"]
    said = f"{disk['free'] / GIB:.0f} GiB free at {disk['at']}"
    if disk["free"] < 0.05 * disk["total"]:
        return Verdict("fail", f"{said}; Ray stops at 95 % full", "free some, or set TMPDIR")
    if disk["free"] < 5 * GIB:
        return Verdict("warn", said, "free some: logs, cached shards and spilled objects lie there")
    return Verdict("ok", said)


def _open_files(m: dict, d: dict) -> Verdict:
    said = f"ulimit -n {m['open_files']}"
    if m["open_files"] < 8192:
        level = "fail" if m["open_files"] < 1024 else "warn"
        return Verdict(level, said, "run `ulimit -n 65536` before `ray start`")
    return Verdict("ok", said)


def _clock(m: dict, d: dict) -> Verdict:
    off, within = m["clock"]
    skew = max(0.0, abs(off) - within)
    if skew <= 1:
        return Verdict("ok", "within a second of the driver's")
    said = f"{skew:.0f} s {'ahead of' if off > 0 else 'behind'} the driver's"
    do = "synchronise the clocks (chrony, ntp): S3 refuses requests 15 minutes off"
    return Verdict("fail" if skew > 300 else "warn", said, do)


def _storage(m: dict, d: dict) -> Verdict:
    if m["storage_write"]:
        do = "let every node write --root, credentials in the environment of its `ray start`"
        return Verdict("fail", f"cannot write {d['root']}: {m['storage_write']}", do)
    if m["storage_read"]:
        do = "give a --root that all nodes share: s3://…, gs://…, or a disk mounted on each"
        return Verdict("fail", f"what {m['read_from']} wrote: {m['storage_read']}", do)
    return Verdict("ok", f"{d['root']} is written and read")


def _mlflow(m: dict, d: dict) -> Verdict:
    if m["mlflow"]:
        do = "start the server, open its port, and name the host in --allowed-hosts"
        return Verdict("fail", f"{d['mlflow_uri']}: {m['mlflow']}", do)
    if d["nodes"] > 1 and not d["mlflow_uri"].startswith("http"):
        do = "run `mlflow server` on the head and set MLFLOW_TRACKING_URI=http://HEAD:5000"
        return Verdict("warn", f"{d['mlflow_uri']} is one machine's file", do)
    return Verdict("ok", d["mlflow_uri"])


CHECKS: dict[str, Callable[[dict, dict], Verdict]] = {
    "ray": _ray,
    "python": _python,
    "packages": _packages,
    "code": _same_code,
    "gpu": _gpu,
    "memory": _memory_per_cpu,
    "/dev/shm": _shm,
    "disk": _disk,
    "open files": _open_files,
    "clock": _clock,
    "storage": _storage,
    "mlflow": _mlflow,
}


def upload(sizes: dict[str, int]) -> Line:
    """What `ray job submit --working-dir .` sends from here, by the bytes of its files."""
    total = sum(sizes.values())
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        part = name.split("/", 1)[0]
        parts[part] = parts.get(part, 0) + size
    said = f"--working-dir . sends {len(sizes)} files, {total / 2**20:.1f} MiB"
    if total <= UPLOAD_LARGE:
        return Line("ok", "upload", "this folder", said, "")
    largest = max(parts, key=lambda part: parts[part])
    said += f", {parts[largest] / 2**20:.1f} of them {largest}"
    do = f"put it elsewhere, or {largest} into .rayignore (Ray takes 100 MiB)"
    return Line("fail" if total > UPLOAD_LIMIT else "warn", "upload", "this folder", said, do)


def lines(driver: dict, machines: dict[str, dict]) -> list[Line]:
    """A line for every check and every different verdict, machines of one verdict together.

    A machine of which only `lost` is known, why it could not be looked at, has failed.
    """
    seen = {name: m for name, m in machines.items() if "lost" not in m}
    nccl = next((m["gpu"]["nccl"] for m in seen.values() if m["gpu"]["nccl"]), None)
    driver = {**driver, "nccl": nccl, "nodes": len(machines)}
    do = "look at the node's log, or take it out of the cluster"
    out = [Line("fail", "node", name, m["lost"], do) for name, m in machines.items() if "lost" in m]
    for check, verdict_of in CHECKS.items():
        groups: dict[Verdict, list[str]] = {}
        for name, machine in seen.items():
            groups.setdefault(verdict_of(machine, driver), []).append(name)
        for verdict in sorted(groups, key=lambda verdict: ORDER.index(verdict.level)):
            where = _where(groups[verdict], len(seen))
            out.append(Line(verdict.level, check, where, verdict.said, verdict.do))
    return out


def _where(names: list[str], of: int) -> str:
    if len(names) == of:
        return "this machine" if of == 1 else f"all {of} nodes"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
