"""Epochs of steps with a checkpoint after each, and from any checkpoint on.

What is trained is a `Trainer`: the two towers, or LeaPRR. The loop knows nothing of what it learns.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.storage.plan import Piece
from pipeline.training import checkpoint as checkpoint_files
from pipeline.training.distributed import ProcessGroup, check_storage
from pipeline.training.loading import waiting
from pipeline.training.weights import published
from schemas.checkpoint import Checkpoint

Report = Callable[[list[dict]], None]  # takes new records, from every worker
Live = Callable[[dict[str, float]], None]  # takes how fast a worker is at the moment
RSUM = "val/rsum"
CHOSEN_BY = {"best": RSUM, "best_ndcg": "val/ndcg_label"}  # the higher the better
OVER = "val/rsum_over_zero_shot"  # of an epoch: what training has won so far; below 0: lost
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How long a training goes on, what it hands on, and how often it says where it is."""

    epochs: int
    select: str = "best"  # a name of CHOSEN_BY, or "last"
    patience: int = 0  # epochs without a better figure on val until it ends; 0: all epochs
    log_every: int = 0  # steps between records; 0: those of epochs alone
    checkpoint_every: int = 0  # steps between checkpoints inside an epoch; 0: none
    resume: str | None = None  # other settings' checkpoint: "latest" of this folder, or a URI
    before: bool = False  # val is measured before the first step too, and epochs against that
    stop_below: int = 0  # epochs in a row with less on val than before, until it ends; 0: never
    keep_epochs: int = 0  # last epochs whose checkpoints are kept


class Trainer(Protocol):
    """What is trained. Every worker has one, and all workers are asked the same in turn."""

    course: Course
    steps: int  # of an epoch
    about: dict[str, Any]  # of every checkpoint: settings, data_version, label_version
    vocabulary_state: list | dict | None  # None where there are no words

    def batches(self, epoch: int, start: int) -> Iterator:
        """The batches of an epoch from step `start` on."""

    def loading(self) -> tuple[float, float]:
        """Seconds that who makes batches was busy since this was asked last, and in storage."""

    def close(self) -> None:
        """End who makes batches."""

    def pairs(self, batch) -> int:
        """How many pairs the batch has on all workers together."""

    def step(self, batch, number: int) -> Callable[[], dict[str, float]]:
        """Take step `number`; a function that reads its record (reading waits for the device)."""

    def of_epoch(self, record: dict[str, float]) -> dict[str, float]:
        """What an epoch's record says of its training, by the record of its last step."""

    def validate(self) -> dict[str, float]:
        """Figures on val by their names; empty where there is no val."""

    def state(self) -> tuple[checkpoint_files.Tensors, dict]:
        """Tensors by file, and the optimizer's rest; raises where they are not finite.

        They may be the very ones that are trained, and shares of them: they are copied.
        """

    def frozen(self) -> dict[str, torch.Tensor]:
        """The weights that are not trained and in no checkpoint, by name."""

    def restore(self, checkpoint: Checkpoint, files: checkpoint_files.Tensors) -> None:
        """Put back what `state` gave."""

    def same_batches(self, checkpoint: Checkpoint) -> bool:
        """Whether the training that a checkpoint is of saw the same batches."""

    def summary(self, chosen: Checkpoint, records: list[dict], torn: list[str]) -> dict:
        """What the stage's index says of the model; `torn` are checkpoints nobody could read."""


class Finish(Protocol):
    """What becomes of the chosen checkpoint's weights before they are handed on. All workers."""

    def begin(self, loop: "Loop") -> None:
        """Called before the first step, and not where a training goes on."""

    def weights(self, loop: "Loop", found: checkpoint_files.Tensors) -> tuple[dict, dict]:
        """The weights by name in place of those `found`, and what the summary says of it."""


class Loop:
    """A training in progress: how far it is, and all that it leaves in its folder."""

    def __init__(
        self,
        build: Callable[[Piece, ProcessGroup], Trainer],
        piece: Piece,
        report: Report = lambda records: None,
        leaving: Callable[[], bool] = lambda: False,  # whether this node is to be taken away
        live: Live = lambda figures: None,
        finish: Finish | None = None,
    ):
        self.piece, self.report, self.leaving, self.world = piece, report, leaving, ProcessGroup()
        self.live, self.finish = live, finish
        self.folder = piece.output.rsplit("/", 1)[0]
        self.checkpoints = store.join(self.folder, "checkpoints")
        self.epoch = self.step = 0  # finished ones
        self.best: dict[str, float] = {"step": 0, "epoch": 0}
        self.records: list[dict] = []  # by step, all of them
        self.reported = 0  # records that were handed on
        check_storage(self.world, store.join(self.folder, f"probes-{piece.fingerprint}"))
        self.trainer = build(piece, self.world)
        self.course = self.trainer.course
        kept = self.course.keep_epochs
        self.writer = checkpoint_files.Writer(self.checkpoints, self.world, kept)
        self.written: int | None = None  # records of the checkpoint that is being written
        self._resume()

    def run(self) -> None:
        """Train to the end and publish."""
        try:
            if not self.step and not self.records:
                self._before()
            while not self.over:
                self.run_epoch()
            self.settle()
        except BaseException as error:
            self.writer.give_up(error)
            raise
        self.publish()

    @property
    def over(self) -> bool:
        """All epochs are done, or too many of the last were no better, or worse than none."""
        course, stale = self.course, self.epoch - self.best["epoch"]
        lost = 0  # epochs in a row, the last ones
        for record in self.records:
            if record.get("epoch"):
                lost = lost + 1 if record.get(OVER, 0.0) < 0 else 0
        return (
            self.epoch >= course.epochs
            or 0 < course.patience <= stale
            or 0 < course.stop_below <= lost
        )

    def _before(self) -> None:
        """What is known before the first step."""
        if self.finish is not None:
            self.finish.begin(self)
        if self.course.before and (found := self.trainer.validate()):
            self.records.append({"step": 0, "epoch": 0, **found})

    def _over_before(self, found: dict[str, float]) -> dict[str, float]:
        """By how much val has more than before training; a word in the log where it has less."""
        before = next((r[RSUM] for r in self.records if r.get("epoch") == 0 and RSUM in r), None)
        if before is None or RSUM not in found:
            return {}
        over = found[RSUM] - before
        if over < 0 and self.world.rank == 0:
            LOG.warning(
                "epoch %d: val rSum %.1f is below zero-shot, %.1f before training; a lower "
                "train.lr, a longer train.lr_warmup or train.interpolate may help",
                *(self.epoch, found[RSUM], before),
            )
        return {OVER: over}

    def run_epoch(self) -> None:
        """Train to the end of the epoch, validate, and have a checkpoint written."""
        trainer, course = self.trainer, self.course
        begin, end = self.epoch * trainer.steps, (self.epoch + 1) * trainer.steps
        started, pairs = time.perf_counter(), 0
        data, pace = waiting.Stopwatch(self.world.device), Pace(self.live, self.step)
        exchanged = self.world.exchanging.seconds
        for batch in waiting.watched(trainer.batches(self.epoch, self.step - begin), data):
            pairs += trainer.pairs(batch)
            record = trainer.step(batch, self.step)
            self.step += 1
            logged = bool(course.log_every) and self.step % course.log_every == 0
            if logged:
                self.records.append({"step": self.step, **record()})
                if self.written is not None and self.writer.done():
                    self.settle()
                pace.tell(self.step, data.seconds, pairs)
            due = bool(course.checkpoint_every) and self.step % course.checkpoint_every == 0
            # Only where records are read anyway: asking waits for every worker.
            leaves = logged and self.step < end and self.leaving()
            if self.step < end and (due or leaves):
                self._write_checkpoint({})
            if leaves:
                self.settle()
        last = record()  # waits for the device, which may be steps behind
        pace.tell(self.step, data.seconds, pairs)
        seconds = time.perf_counter() - started
        shares = data.seconds, *trainer.loading(), self.world.exchanging.seconds - exchanged
        self.epoch += 1
        summary = {
            "step": self.step,
            "epoch": self.epoch,
            "train/samples_per_second": pairs / seconds,
            **waiting.figures(self.world.every([share / seconds for share in shares])),
            **trainer.of_epoch(last),
            **trainer.validate(),
        }
        summary |= self._over_before(summary)
        self.records.append(summary)
        name = CHOSEN_BY.get(course.select, "val/rsum")
        score = summary.get(name, -1.0)
        newest = course.select == "last" or name not in summary  # nothing says which is better
        if newest or score > self.best.get(name, -1.0):
            self.best = {"step": self.step, "epoch": self.epoch, name: score}
        self._write_checkpoint(summary)

    def _write_checkpoint(self, metrics: dict[str, float]) -> None:
        """Have written where training is now, after what is being written is durable and told."""
        self.settle()
        files, optimizer = self.trainer.state()
        about = {
            **self.trainer.about,
            "fingerprint": self.piece.fingerprint,
            "epoch": self.epoch,
            "step": self.step,
            "metrics": metrics,
            "best": self.best,
            "optimizer": optimizer,
            "records": list(self.records),  # those beside it may be another try's, not yet dead
        }
        self.writer.begin(about, files, self.trainer.vocabulary_state or [])
        self.written = len(self.records)

    def settle(self) -> None:
        """Wait until what is being written is durable, then report the records that it holds.

        So a report lags behind its checkpoint: until the next step whose record is read and finds
        it written, else until the next checkpoint or the end. One that a kill loses is made up for
        by the end.
        """
        if self.written is None:
            return
        self.writer.wait()
        self.report(self.records[self.reported : self.written])
        self.reported, self.written = self.written, None

    def _resume(self) -> None:
        """Go on from this training's newest checkpoint, else from the one of `course.resume`."""
        found, self.torn = checkpoint_files.latest(self.checkpoints)
        mine = found is not None and found[0].fingerprint == self.piece.fingerprint
        given = self.course.resume
        elsewhere = not mine and given not in (None, "latest")
        if elsewhere and (found := checkpoint_files.read(given)) is None:
            raise InputError(f"train.resume {given} is no whole checkpoint; give its folder")
        if found is None or not (mine or given):
            if self.world.rank == 0:  # what lies here belongs to other settings
                store.remove(self.checkpoints)
            self.world.barrier()
            return
        checkpoint, files = found
        self.trainer.restore(checkpoint, files)
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        self.records = checkpoint.records
        if not (mine or self.trainer.same_batches(checkpoint)):
            # The epoch that was begun is begun again, with the batches there are now.
            self.step = self.epoch * self.trainer.steps
            self.records = at_pace(self.records, self.epoch, self.trainer.steps)
        self.reported = len(self.records) if mine else 0  # its record begins with theirs
        if elsewhere:  # the best one so far lies elsewhere
            self.best = {"step": 0, "epoch": self.epoch}
            if self.over:
                raise InputError(f"{given} ends epoch {self.epoch} already; give more --epochs")

    def publish(self) -> None:
        """Put the chosen checkpoint's weights where the later stages look for them, all of them."""
        frozen = checkpoint_files.whole({"": self.trainer.frozen()}, self.world.rank == 0)
        uri = store.join(self.checkpoints, checkpoint_files.name_of(self.best["step"]))
        found = None
        if self.world.rank == 0 or self.finish is not None:
            found = checkpoint_files.read(uri)
            if found is None:
                raise InputError(f"{uri} is torn; delete it and train again")
        more: dict[str, Any] = {}
        chosen = found[1]["model"] if found else {}
        if found and self.finish is not None:
            chosen, more = self.finish.weights(self, found[1])
        if found and self.world.rank == 0:
            weights = {**frozen[""], **chosen}
            summary = self.trainer.summary(found[0], self.records, self.torn) | more
            words = self.trainer.vocabulary_state
            published.write(self.piece, weights, words, summary, self.records)
        self.world.barrier()


class Pace:
    """How fast a worker is since it last told: its own figures, not the mean of all."""

    def __init__(self, live: Live, step: int):
        self.live, self.last = live, (time.perf_counter(), step, 0.0, 0)

    def tell(self, step: int, waited: float, pairs: int) -> None:
        """Hand on the figures of the steps since the last time; `waited` and `pairs` add up."""
        now = time.perf_counter(), step, waited, pairs
        seconds, steps, wait, more = (n - t for n, t in zip(now, self.last, strict=True))
        if not steps:
            return
        self.last = now
        self.live(
            {
                "samples_per_second": more / seconds,
                "data_wait": wait / seconds,
                "step_seconds": seconds / steps,
            }
        )


def at_pace(records: list[dict], epochs: int, steps: int) -> list[dict]:
    """The records of the first `epochs` epochs, as if those had had `steps` steps each.

    So the course of a training that goes on with other batches is one curve.
    """
    ends = {record["epoch"]: record["step"] for record in records if "epoch" in record}
    if not epochs:
        return [record for record in records if not record["step"]]  # before the first step
    if epochs not in ends:
        return []
    pace = epochs * steps / ends[epochs]
    kept: dict[tuple, dict] = {}  # where steps become one, the last of them
    for record in records:
        if record["step"] <= ends[epochs]:
            step = max(1, round(record["step"] * pace)) if record["step"] else 0
            kept[step, "epoch" in record] = {**record, "step": step}
    return list(kept.values())
