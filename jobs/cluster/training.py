"""Training on Ray Train; on the Ray of this very command, without it (own_training.py)."""

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from jobs.cluster import gauges, own_training, torchrun
from jobs.cluster.polling import meanwhile
from jobs.cluster.tasks import LOOK_SECONDS, Say, _explained, _Nodes, _to_stderr, connect, is_own
from pipeline.errors import InputError, Unreachable
from pipeline.storage import store
from pipeline.storage.plan import Piece
from schemas.settings import TrainSettings


def train(
    fit: Callable,
    piece: Piece,
    settings: TrainSettings,
    record: Callable[[list[dict]], None],
    monitor: Callable[[str], AbstractContextManager] = lambda node: nullcontext(),
    say: Say = _to_stderr,
) -> None:
    """Run `fit(piece, report, leaving, live)` on all workers; `record` gets every epoch's records.

    One process of each node runs inside `monitor(node)`.

    A lost worker restarts all of them, and `fit` goes on from its newest checkpoint; with
    `train.min_workers` on as many nodes as there are then. `say` tells so.

    Under torchrun its workers train, and no Ray.
    """
    if torchrun.rank() is not None:
        return torchrun.train(fit, piece, settings, record, monitor)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    if is_own():
        own_training.train(fit, piece, settings, record, monitor, say)
        return None
    storage = store.join(piece.output.rsplit("/", 1)[0], "ray")
    losses = store.join(storage, "losses")
    fewest = settings.min_workers if settings.min_workers < settings.workers else 0
    job = ray.get_runtime_context().get_job_id()
    nodes = _Nodes((), False, say)
    nodes.try_all()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"fit": fit, "piece": piece, "monitor": monitor},
        torch_config=TorchConfig(timeout_s=settings.timeout),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(fewest, settings.workers) if fewest else settings.workers,  # type: ignore[arg-type]
            use_gpu=bool(ray.cluster_resources().get("GPU")),
            label_selector=nodes.left_out(),
        ),
        run_config=RunConfig(
            # A new name every time: Ray would take a known one for a finished run and do nothing.
            name=f"{piece.fingerprint}-{job}-{os.getpid()}",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[_recorder(record, losses)],
        ),
    )
    try:
        with _heard(losses, say):
            result = trainer.fit()
    except Exception as error:  # Ray Train's errors have no public common base
        raise _explained(piece.name, error) from error
    if problem := (result.metrics or {}).get("input_error"):
        raise InputError(problem)
    return store.remove(storage)


def _worker(config: dict) -> None:
    import ray.train

    def report(records: list[dict]) -> None:
        ray.train.report({"records": records})

    def leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    context = ray.train.get_context()
    first = context.get_local_rank() == 0
    watched = config["monitor"](f"node-{context.get_node_rank()}") if first else nullcontext()
    live = gauges.of_training(config["piece"], context.get_world_rank())
    try:
        with watched:
            config["fit"](config["piece"], report, leaving, live)
    except Unreachable:  # Ray Train starts all again
        raise
    except InputError as error:  # the same again would not help: no restart
        ray.train.report({"input_error": str(error)})
    finally:
        live({})


def _recorder(record: Callable[[list[dict]], None], losses: str):
    """A Ray Train callback (it lives in the controller) that hands on worker 0's records.

    What workers are lost is written to the folder `losses`: the driver hears of it there.
    """
    from ray.train import UserCallback

    class Recorder(UserCallback):
        def after_report(self, run_context, metrics, checkpoint) -> None:
            record(metrics[0].get("records", []))

        def after_exception(self, run_context, worker_exceptions) -> None:
            reasons = {type(error).__name__ for error in worker_exceptions.values()}
            ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
            words = f"worker {ranks} was lost ({', '.join(sorted(reasons))})"
            with contextlib.suppress(OSError, InputError):  # words are not worth a training
                store.write_bytes(store.join(losses, f"{time.time():.3f}"), words.encode())

    return Recorder()


def _heard(losses: str, say: Say) -> AbstractContextManager:
    """While it is entered, what the training lost is said: nodes, and workers from `losses`."""
    nodes = _Nodes((), False, say)
    known = set(store.list_files(losses))  # of an earlier try that was killed

    def listen() -> None:
        nodes.look()
        with contextlib.suppress(OSError, InputError):  # storage that is away is asked again
            for name in sorted(store.list_files(losses).keys() - known):
                known.add(name)
                words = store.read_text(store.join(losses, name))
                say(f"  train: {words}; all start again from the newest checkpoint")

    return meanwhile(listen, LOOK_SECONDS)
