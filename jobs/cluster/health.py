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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.storage import probe, store

PACKAGES = (  # whose versions change bytes, numbers or what can be read
    *("torch", "numpy", "pyarrow", "pillow", "scikit-learn", "safetensors", "pydantic", "fsspec"),
    *("sentence-transformers", "transformers", "tokenizers", "webdataset", "mlflow"),
)
OPTIONAL = ("numba", "s3fs", "gcsfs", "peft")
GIB = 2**30
UPLOAD_LIMIT = 100 * 2**20  # Ray's
UPLOAD_LARGE = 10 * 2**20  # Halftone itself is 2 MB
ORDER = ("fail", "warn", "ok")


class Line(NamedTuple):
    """The machines of which a check says the same."""

    level: str  # ok, warn or fail
    check: str
    where: str
    said: str
    do: str = ""


# ---- facts -------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What this machine is like, in bytes and counts."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    return {
        "ray": _version("ray"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "code": _code(),
        "gpu": _gpus(),
        "cpus": os.cpu_count(),
        "memory": _memory(),
        "shm": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
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
# Each is its name, what is said where all is well, and faults: (level, whether it is so, what is
# said of it, what to do), the worst first.


def _of_software(m: dict, d: dict) -> Iterator[tuple]:
    there, wanted = m["packages"], d["packages"]
    said = f"{m['ray']}, the driver has {d['ray']}"
    yield "ray", m["ray"], ("fail", m["ray"] != d["ray"], said, f"install {d['ray']}")
    minor, minor_d = (facts["python"].split(".")[:2] for facts in (m, d))
    said = f"{m['python']}, the driver has {d['python']}"
    do = "use one image, or one environment, on all nodes"
    differs = m["python"] != d["python"]
    yield "python", m["python"], ("fail", minor != minor_d, said, do), ("warn", differs, said, do)
    other = [name for name in there if there[name] != wanted[name]]
    each = (f"{n} {there[n] or 'missing'} (driver {wanted[n] or 'has none'})" for n in other)
    said = ", ".join(each)
    do = "install the same on every node (-c constraints.txt)"
    well = f"{sum(version is not None for version in there.values())} as the driver's"
    needed = not set(PACKAGES).isdisjoint(other)
    yield "packages", well, ("fail", needed, said, do), ("warn", other, said, do)
    do = "submit the job with --working-dir ., or install one version on every node"
    differs = m["code"] != d["code"]
    yield "code", "the driver's", ("fail", differs, "another Halftone than the driver's", do)


def _of_machine(m: dict, d: dict) -> Iterator[tuple]:
    gpu, lent = m["gpu"], m.get("ray_gpus", 0)
    usable, there, said = len(gpu["names"]), max(gpu["there"], lent), "none"
    if usable:
        said = f"{usable} × {gpu['names'][0]}, NCCL {gpu['nccl']}"
    few = f"torch {gpu['torch']} uses {usable} of {there:g}"
    other = there and gpu["nccl"] != (d["nccl"] or gpu["nccl"])
    do = "start Ray on the node with --num-gpus, or let it count them itself"
    yield (
        "gpu",
        said,
        ("fail", usable < there, few, "install torch built for the node's CUDA driver"),
        ("fail", other, f"{said}, others have {d['nccl']}", "install the same torch"),
        ("warn", lent < usable, f"{said}, Ray hands out {lent:g}", do),
    )
    cpus = m.get("ray_cpus") or m["cpus"]
    said = f"{m['memory'] / GIB:.0f} GiB for {cpus:g} CPUs"
    do = f"start Ray on the node with --num-cpus {max(1, int(m['memory'] / GIB))}"
    little = m["memory"] < cpus * GIB
    yield "memory", said, ("warn", little, f"{said}; a task takes about 1 GiB", do)
    said = f"/dev/shm holds {m['shm'] / GIB:.1f} GiB"
    less = f"{said}, less than Ray's object store; Ray uses the disk"
    do = "give the container a larger one (docker --shm-size, an emptyDir of medium Memory)"
    yield "/dev/shm", said, ("warn", m["shm"] < m.get("object_store", 0), less, do)
    free, said = m["disk"]["free"], f"{m['disk']['free'] / GIB:.0f} GiB free at {m['disk']['at']}"
    full = f"{said}; Ray stops at 95 % full"
    do = "free some: logs, cached shards and spilled objects lie there"
    yield (
        "disk",
        said,
        ("fail", free < 0.05 * m["disk"]["total"], full, "free some, or set TMPDIR"),
        ("warn", free < 5 * GIB, said, do),
    )
    files, do = m["open_files"], "run `ulimit -n 65536` before `ray start`"
    said = f"ulimit -n {files}"
    yield "open files", said, ("fail", files < 1024, said, do), ("warn", files < 8192, said, do)


def _of_reach(m: dict, d: dict) -> Iterator[tuple]:
    off, within = m["clock"]
    skew = max(0.0, abs(off) - within)
    said = f"{skew:.0f} s {'ahead of' if off > 0 else 'behind'} the driver's"
    do = "synchronise the clocks (chrony, ntp): S3 refuses requests 15 minutes off"
    well = "within a second of the driver's"
    yield "clock", well, ("fail", skew > 300, said, do), ("warn", skew > 1, said, do)
    write, read = m["storage_write"], m["storage_read"]
    do = "let every node write --root, credentials in the environment of its `ray start`"
    share = "give a --root that all nodes share: s3://…, gs://…, or a disk mounted on each"
    yield (
        "storage",
        f"{d['root']} is written and read",
        ("fail", write, f"cannot write {d['root']}: {write}", do),
        ("fail", read, f"what {m['read_from']} wrote: {read}", share),
    )
    uri, why = d["mlflow_uri"], m["mlflow"]
    alone = d["nodes"] > 1 and not uri.startswith("http")
    do = "start the server, open its port, and name the host in --allowed-hosts"
    serve = "run `mlflow server` on the head and set MLFLOW_TRACKING_URI=http://HEAD:5000"
    yield (
        "mlflow",
        uri,
        ("fail", why, f"{uri}: {why}", do),
        ("warn", alone, f"{uri} is one machine's file", serve),
    )


def _verdicts(m: dict, d: dict) -> Iterator[tuple[str, tuple]]:
    """What every check, by name, says of a machine: (level, what is said, what to do)."""
    for name, well, *faults in (*_of_software(m, d), *_of_machine(m, d), *_of_reach(m, d)):
        found = ((level, said, do) for level, wrong, said, do in faults if wrong)
        yield name, next(found, ("ok", well, ""))


def upload(sizes: dict[str, int]) -> Line:
    """What `ray job submit --working-dir .` sends from here, by the bytes of its files."""
    total = sum(sizes.values())
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        parts[name.split("/", 1)[0]] += size
    said = f"--working-dir . sends {len(sizes)} files, {total / 2**20:.1f} MiB"
    if total <= UPLOAD_LARGE:
        return Line("ok", "upload", "this folder", said)
    [(largest, size)] = parts.most_common(1)
    said += f", {size / 2**20:.1f} of them {largest}"
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
    checks: dict[str, dict[tuple, list[str]]] = {}
    for name, machine in seen.items():
        for check, verdict in _verdicts(machine, driver):
            checks.setdefault(check, {}).setdefault(verdict, []).append(name)
    for check, groups in checks.items():
        for level, said, do in sorted(groups, key=lambda verdict: ORDER.index(verdict[0])):
            where = _where(groups[level, said, do], len(seen))
            out.append(Line(level, check, where, said, do))
    return out


def _where(names: list[str], of: int) -> str:
    if len(names) == of:
        return "this machine" if of == 1 else f"all {of} nodes"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
