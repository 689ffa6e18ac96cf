"""Training under torchrun: this process is one of its workers, and no Ray is started.

Worker 0 does all that the command does; the others take part in its trainings alone.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from pipeline.errors import InputError
from pipeline.storage.plan import Piece
from schemas.settings import Recipe, TrainSettings


def rank() -> int | None:
    """This process's place among the workers; None where torchrun (or one like it) is not."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["RANK"]) if started else None


def check(command: str, dry: bool) -> None:
    """Refuses what several processes would all do."""
    if rank() is not None and (command != "train" or dry):
        raise InputError(
            f"torchrun starts every process of a training, and `halftone {command}"
            f"{' --dry-run' if dry else ''}` is one process; run it without torchrun"
        )


def train(
    fit: Callable[[Piece, Callable], None],
    piece: Piece,
    settings: TrainSettings,
    record: Callable[[list[dict]], None],
    monitor: Callable[[str], AbstractContextManager],
) -> None:
    """Run `fit(piece, report)` as worker 0; `record` gets the records, `monitor` watches here."""
    from pipeline.training.distributed import start

    start(settings.timeout)
    with monitor("node-0"):
        fit(piece, record)


def take_part(root: str, models: list[tuple[str, Recipe]]) -> None:
    """Be another worker than the first in the trainings that the first one has to do."""
    from pipeline.training import train as stage
    from pipeline.training.distributed import start

    for name, recipe in models:
        plan = stage.plan(recipe, root, name)
        if plan.pending:
            start(recipe.train.timeout)
            stage.fit(plan.pieces[0], lambda records: None)
