"""Processes forked from one that has imported the libraries: they start in no time."""

import multiprocessing
import os
import sys
from collections.abc import Callable

# torch._dynamo comes with the first optimizer, and takes as long as torch.
IMPORTED = ["pytest", "torch._dynamo", "sentence_transformers", "mlflow", "jobs.end_to_end"]
IMPORTED += ["pipeline.training.trainer", "pipeline.reranking.leaprr.training"]
IMPORTED += ["pipeline.retrieval.compiled", "pipeline.formulas.kernels.compiled"]


def context():
    """What makes processes; the one they are forked from is started with the first of them."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def start(printed: str, work: Callable[..., None], *given) -> multiprocessing.Process:
    """A process in a session of its own that does `work(*given)` and prints into a file."""
    process = context().Process(target=_apart, args=(printed, work, *given))
    process.start()
    return process


def _apart(printed: str, work: Callable[..., None], *given) -> None:
    os.setsid()
    with open(printed, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    work(*given)
