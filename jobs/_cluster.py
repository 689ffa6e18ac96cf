"""Where the work runs: the one place that knows Ray.

With RAY_ADDRESS the cluster it names, else a small Ray of this machine's own.
"""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pipeline import _store
from pipeline._errors import InputError
from pipeline._plan import Piece
from schemas.settings import TrainSettings

OBJECT_STORE_BYTES = 300 * 2**20  # results are small: bytes go to storage, not through Ray
WINDOW_PER_CPU = 4  # tasks handed to Ray ahead of those that run

# Ray Train's controller looks at its workers every 2 s unless told, and a report waits for a look.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks that were given up
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


class WorkFailed(Exception):
    """A task or a training failed; the message names the piece, the cause is kept."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; once per process."""
    import ray

    if ray.is_initialized():
        return
    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # this Ray listens on loopback only
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def fan_out(
    make: Callable[[Piece], dict],
    pieces: Iterable[Piece],
    *,
    gpu: bool = False,
    done: Callable[[Piece, dict], None] = lambda piece, summary: None,
) -> dict[str, dict]:
    """Summaries by piece name of `make(piece)` for all pieces, as Ray tasks.

    At most a window of tasks is handed to Ray at a time. Tasks whose worker or node died run
    again; an error of the task itself ends the whole, with the piece's name.
    """
    pieces = list(pieces)
    if not pieces:  # a run with nothing to do starts nothing
        return {}
    import ray

    connect()
    resources = ray.cluster_resources()
    gpus = 1 if gpu and resources.get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(make)
    window = WINDOW_PER_CPU * max(1, int(resources.get("CPU", 1)))
    waiting = iter(pieces)
    running: dict[Any, Piece] = {}
    made: dict[str, dict] = {}
    while True:
        while len(running) < window and (piece := next(waiting, None)) is not None:
            running[task.remote(piece)] = piece
        if not running:
            return made
        ready, _ = ray.wait(list(running), num_returns=1)
        piece = running.pop(ready[0])
        try:
            made[piece.name] = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            for other in running:
                ray.cancel(other)
            raise _explained(piece.name, error) from error
        done(piece, made[piece.name])


def train(
    fit: Callable[[Piece, Callable], None],
    piece: Piece,
    settings: TrainSettings,
    record: Callable[[list[dict]], None],
    monitor: Callable[[str], AbstractContextManager] = lambda node: nullcontext(),
) -> None:
    """Run `fit(piece, report)` on Ray Train's workers; `record` gets every epoch's records.

    One worker of each node runs inside `monitor(node)`.

    A lost worker restarts all of them, and `fit` goes on from its newest checkpoint; with
    `train.min_workers` on as many nodes as there are then.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    storage = _store.join(piece.output.rsplit("/", 1)[0], "ray")
    fewest = settings.min_workers if settings.min_workers < settings.workers else 0
    job = ray.get_runtime_context().get_job_id()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"fit": fit, "piece": piece, "monitor": monitor},
        torch_config=TorchConfig(timeout_s=settings.timeout),
        scaling_config=ScalingConfig(
            num_workers=(fewest, settings.workers) if fewest else settings.workers,
            use_gpu=bool(ray.cluster_resources().get("GPU")),
        ),
        run_config=RunConfig(
            # A new name every time: Ray would take a known one for a finished run and do nothing.
            name=f"{piece.fingerprint}-{job}-{os.getpid()}",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[_recorder(record)],
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # Ray Train's errors have no public common base
        raise _explained(piece.name, error) from error
    if problem := (result.metrics or {}).get("input_error"):
        raise InputError(problem)
    _store.remove(storage)


def _worker(config: dict) -> None:
    import ray.train

    def report(records: list[dict]) -> None:
        ray.train.report({"records": records})

    def leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    context = ray.train.get_context()
    first = context.get_local_rank() == 0
    watched = config["monitor"](f"node-{context.get_node_rank()}") if first else nullcontext()
    try:
        with watched:
            config["fit"](config["piece"], report, leaving)
    except InputError as error:  # the same again would not help: no restart
        ray.train.report({"input_error": str(error)})


def _recorder(record: Callable[[list[dict]], None]):
    """A Ray Train callback (it lives in the controller) that hands on worker 0's records."""
    from ray.train import UserCallback

    class Recorder(UserCallback):
        def after_report(self, run_context, metrics, checkpoint) -> None:
            record(metrics[0].get("records", []))

    return Recorder()


def _explained(name: str, error: Exception) -> Exception:
    """The input error inside a Ray error, or a failure that names the piece and its first cause."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner  # Ray's errors hold in `cause` what the task raised
    if isinstance(cause, InputError):
        return InputError(f"{name}: {cause}")
    reason = " ".join(str(cause).split()) or "no message"
    return WorkFailed(f"{name} failed: {type(cause).__name__}: {reason[:500]}")
