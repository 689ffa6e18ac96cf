"""Training on the Ray that a command started for itself: in the processes that made the pieces.

Ray Train starts a controller and new workers, and each imports everything again: seconds of work
that a small training does not pay back. Here a worker is a Ray task, in a process that has torch
already; the driver is on the same machine and sees to the rest. `fit` is the same.
"""

import contextlib
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from jobs.cluster import gauges
from jobs.cluster.polling import meanwhile
from jobs.cluster.tasks import PATIENCE, Say, _explained
from pipeline.errors import InputError, Unreachable
from pipeline.storage import store
from pipeline.storage.plan import Piece
from schemas.settings import TrainSettings

FOLLOW = 5.0  # seconds in which the other workers notice that one of them is gone
LOOK = 1.0  # seconds between looks at what was recorded


def train(
    fit: Callable,
    piece: Piece,
    settings: TrainSettings,
    record: Callable[[list[dict]], None],
    monitor: Callable[[str], AbstractContextManager],
    say: Say,
) -> None:
    """As `training.train`, of which this is one way."""
    tries = 0
    with monitor("node-0"), _followed(piece, record):
        while lost := _tried(fit, piece, settings):
            tries += 1
            if tries > settings.max_failures:
                error = next(iter(lost.values()))
                raise _explained(piece.name, error) from error
            reasons = ", ".join(sorted({type(error).__name__ for error in lost.values()}))
            ranks = ", ".join(map(str, sorted(lost)))
            words = f"worker {ranks} was lost ({reasons})"
            say(f"  train: {words}; all start again from the newest checkpoint")


def _tried(fit: Callable, piece: Piece, settings: TrainSettings) -> dict[int, Exception]:
    """Run all workers to the end; the errors of those that failed, by rank, the crashed first."""
    import ray

    size, room = settings.workers, _room(settings.workers)
    meeting = Path(tempfile.gettempdir()) / f"halftone-{uuid4().hex}"
    task, running = ray.remote(_worker), {}
    for rank in range(size):
        options = {"name": f"train, worker {rank} of {size}", "max_retries": 0, **room}
        asked = (fit, piece, rank, size, str(meeting), settings.timeout)
        running[task.options(**options).remote(*asked)] = rank
    lost: dict[int, Exception] = {}
    try:
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=FOLLOW if lost else None)
            if not ready:
                break  # they wait for one that is gone
            rank = running.pop(ready[0])
            try:
                problem = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                lost[rank] = error
                continue
            if problem:
                raise InputError(problem)
    finally:
        for other in running:
            ray.cancel(other, force=True)
        if running:  # two must not write one folder
            ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)
        meeting.unlink(missing_ok=True)
    # What the others say, that somebody hung up, is of no use to anyone.
    return dict(sorted(lost.items(), key=lambda each: hasattr(each[1], "cause")))


def _room(workers: int) -> dict[str, float]:
    """What Ray lends each worker: a GPU where this machine has some, and its part of the CPUs."""
    import ray

    has = ray.cluster_resources()
    gpus, cpus = int(has.get("GPU", 0)), has.get("CPU", 1)
    if gpus and workers > gpus:
        raise InputError(
            f"train.workers {workers} is more than this machine's {gpus} GPU{'s' * (gpus > 1)}; "
            f"set it to {gpus}, or join a cluster (RAY_ADDRESS)"
        )
    share = min(1.0, int(1000 * cpus / workers) / 1000)
    return {"num_cpus": share, "num_gpus": 1 if gpus else 0}


def _worker(fit: Callable, piece: Piece, rank: int, size: int, meeting: str, timeout: int) -> str:
    """Train as one of `size`; what bad input says, else ''."""
    import torch
    import torch.distributed as dist

    live = gauges.of_training(piece, rank)
    precision = torch.get_float32_matmul_precision()
    try:
        if size > 1:
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
        fit(piece, lambda records: None, lambda: False, live)
    except Unreachable:  # all start again
        raise
    except InputError as error:  # the same again would not help: no other try
        return str(error)
    finally:
        live({})
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_float32_matmul_precision(precision)  # this process goes on to other stages
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""


def _followed(piece: Piece, record: Callable[[list[dict]], Any]) -> AbstractContextManager:
    """While it is entered, `record` is handed the records that the checkpoints bring."""
    uri = store.join(piece.output.rsplit("/", 1)[0], "checkpoints", "records.json")
    seen, known = _stamp(uri), 0

    def look() -> None:
        nonlocal seen, known
        if (now := _stamp(uri)) == seen or now is None:
            return
        with contextlib.suppress(OSError, ValueError, Unreachable):
            records = store.read_json(uri)
            record(records[known:])
            seen, known = now, len(records)

    return meanwhile(look, LOOK)


def _stamp(uri: str) -> list | None:
    try:
        return store.stamp(uri)
    except (OSError, Unreachable):  # figures in MLflow are not worth a training
        return None
