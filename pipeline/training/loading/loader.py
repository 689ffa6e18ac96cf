"""The batches of a worker, in order, made ahead of its steps by other processes."""

import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.models.vocabulary import Known
from pipeline.training.data import Batch, Split
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.device import Copies
from pipeline.training.loading.frames import Frames, Layout
from pipeline.training.loading.making import Made, PairSettings, Part, Shared
from pipeline.training.loading.pool import Processes, Thread
from pipeline.training.sampler import Sampler

AHEAD, AHEAD_BYTES = 4, 2**30  # batches made ahead: so many, or two if they are larger than that
READY = 2  # of them on their way to the device
PARTS = 2  # of a batch for every process: who is done first takes the next one
KEPT_BYTES = 2**30  # decoded images are kept where those of the whole split take no more
MOST_WORKERS = 32  # that are started unasked
PICTURE_BYTES, FEATURE_BYTES = 40e6, 2e9  # of files that are decoded, or read, in two seconds
CPU = torch.device("cpu")


class Task:
    """A batch that is being made."""

    def __init__(self, at: tuple[int, int], frame: int, rows: np.ndarray, captions: np.ndarray):
        self.at, self.frame, self.rows, self.captions = at, frame, rows, captions
        self.left = 0  # parts that are not made
        self.failed: Made | None = None  # the first part that could not be made
        self.batch: Batch | None = None  # once all are


class Loader:
    """Batches of one worker, made ahead of the model by `workers` processes, or by a thread here.

    They are made where all of them and the model find them: in memory that is shared, in frames
    that are used again when a batch is gone. `epochs` is where the training ends: until then the
    first batches of an epoch are made while the one before ends. Call `close` at the end.
    """

    def __init__(
        self,
        order: Sampler,
        vocabulary: Known,
        *,
        rank: int,
        size: int,
        max_words: int | None,
        workers: int = 0,
        augment: Augment | None = None,
        epochs: int = 0,
        device: torch.device = CPU,
    ):
        self.order, self.split, self.vocabulary = order, order.split, vocabulary
        self.lanes = range(rank, order.lanes, size)
        self.max_words, self.workers, self.augment = max_words, workers, augment
        self.epochs, self.copies = epochs, Copies(device)
        self.pool: Processes | Thread | None = None
        self.busy = self.reading = 0.0  # seconds of all processes, and of storage in them
        self._tasks: dict[int, Task] = {}  # by number, those of which parts are not made
        self._ahead: deque[Task] = deque()  # those that are waited for, in order
        self._numbered = self._turn = 0
        self._next: tuple[int, int] | None = None  # epoch and step of the batch that comes next

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from step `start` on. One epoch at a time."""
        if self.pool is None:
            self._open()
        if self._next != (epoch, start):
            self._begin(epoch, start)
        self._turn += 1
        turn = self._turn
        while True:
            if turn != self._turn:
                raise RuntimeError("another epoch of this loader was begun")
            self._fill()
            if not self._ahead or self._ahead[0].at[0] != epoch:
                self._next = epoch + 1, 0
                return
            head = self._ahead[0]
            while head.left:
                self._collect(wait=True)
            if head.failed is not None:
                self._next = None
                raise self._why(head.failed)
            self._next = epoch, self._ahead.popleft().at[1] + 1
            yield self.copies.here(head.batch)

    def spent(self) -> tuple[float, float]:
        """Seconds that a process was busy since this was asked last, and those in storage."""
        found = self.busy / max(1, self.workers), self.reading / max(1, self.workers)
        self.busy = self.reading = 0.0
        return found

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self._begin(0, 0)
            self._end()
            self.pool, self._next = None, None

    def _open(self) -> None:
        split = self.split
        rows = len(self.lanes) * self.order.batch_size // self.order.lanes
        shape: tuple[int, ...] = (3, *split.preprocessing.shape)
        dtype = "uint8"
        if split.features is not None:
            first = split.image(0)
            shape, dtype = first.shape, first.dtype.str
        layout = Layout(rows, shape, dtype, self.vocabulary.longest(self.max_words))
        kept = len(split) if keeps(split, self.augment, layout.image_bytes) else 0
        self.frames = Frames(layout)
        shared = Shared(max(1, self.workers), len(split.tars), kept, layout)
        given = split.preprocessing, self.augment, self.order.seed, self.max_words
        settings = PairSettings(layout, *given, split.copies)
        if self.workers:
            self.pool = Processes(settings, self.vocabulary, self.frames, shared, split.name)
        else:
            self.pool = Thread(settings, self.vocabulary, self.frames, shared)
        self._end = weakref.finalize(self, _end, self.pool, self.copies)
        self._oldest, self._held = shared.oldest, np.zeros(kept, bool)
        self._tasks.clear()
        self._most = AHEAD if AHEAD * self.frames.size <= AHEAD_BYTES else 2

    def _begin(self, epoch: int, start: int) -> None:
        """Let go of what was made ahead, and go on from a step."""
        for task in self._ahead:
            if not task.left and task.batch is None:  # of others a batch, or who makes it, has it
                self.frames.free(task.frame)
        self._ahead.clear()
        self._oldest[0] = self._numbered
        self._next = epoch, start
        self._steps = _pairs(self.order, self.lanes, epoch, start, self.epochs)

    def _fill(self) -> None:
        """Have batches made until enough are, and take those that are ready."""
        while len(self._ahead) < self._most and (found := next(self._steps, None)):
            at, rows, captions = found
            task, number = Task(at, self.frames.take(), rows, captions), self._numbered
            self._numbered += 1
            self._tasks[number] = task
            self._ahead.append(task)
            parts = self._parts(number, task)
            task.left = len(parts)
            self.pool.give(parts)
        self._collect(wait=False)

    def _parts(self, number: int, task: Task) -> list[Part]:
        places, texts = self.split.places(task.rows), self.split.texts(task.captions)
        rows, captions = task.rows.tolist(), task.captions.tolist()
        kept = bool(len(self._held))
        held = self._held[task.rows].tolist() if kept else [False] * len(rows)
        each = -(-len(rows) // (PARTS * max(1, self.workers)))
        parts = []
        for first in range(0, len(rows), each):
            of = slice(first, first + each)
            about = number, task.frame, first, task.at[0]
            parts.append(Part(*about, rows[of], captions[of], held[of], places[of], texts[of]))
        return parts

    def _collect(self, wait: bool) -> None:
        """Take what was made."""
        for made in self.pool.take(wait):
            task = self._tasks[made.task]
            task.left -= 1
            self.busy, self.reading = self.busy + made.busy, self.reading + made.reading
            if made.failed and (task.failed is None or made.first < task.failed.first):
                task.failed = made
            elif made.pairs and len(self._held):
                self._held[task.rows[made.first : made.first + made.pairs]] = True
            if not task.left:
                del self._tasks[made.task]
                if made.task < self._oldest[0]:  # nobody waits for it any more
                    self.frames.free(task.frame)
        for task in islice(self._ahead, READY):
            if not task.left and not task.failed and task.batch is None:
                task.batch = self._batch(task)

    def _batch(self, task: Task) -> Batch:
        images, ids, lengths = self.frames.lend(task.frame)
        longest = int(lengths.max())
        batch = Batch(
            images=torch.from_numpy(images),
            words=torch.from_numpy(ids[:, :longest].copy()),
            lengths=torch.from_numpy(lengths.copy()),
            image_rows=torch.from_numpy(task.rows),
            caption_rows=torch.from_numpy(task.captions),
        )
        return self.copies.begin(batch, self.frames.size)

    def _why(self, made: Made) -> Exception:
        """What went wrong with an image, which is named."""
        row, in_reading, error = made.failed
        name = self.split.name(row)
        if in_reading:
            error.add_note(f"while reading {name}")
            return error
        do = "" if isinstance(error, InputError) else "; run `halftone lint`"
        return InputError(f"{name} cannot be used: {error}{do}")


def _pairs(
    order: Sampler, lanes: Iterable[int], epoch: int, start: int, epochs: int
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """(epoch and step), image rows and caption rows of some lanes, to the training's end."""
    mine = list(lanes)
    while True:
        for step, (rows, captions) in enumerate(order.epoch(epoch, start), start):
            yield (epoch, step), rows[mine].reshape(-1), captions[mine].reshape(-1)
        epoch, start = epoch + 1, 0
        if epoch >= epochs:
            return


def _end(pool: Processes | Thread, copies: Copies) -> None:
    copies.close()
    pool.close()


def keeps(split: Split, augment: Augment | None, image_bytes: int) -> bool:
    """Whether decoded images are kept: they are the same again, and there is room for all."""
    return augment is None and len(split) * image_bytes <= KEPT_BYTES


def workers_for(
    split: Split, augment: Augment | None, *, asked: int, epochs: int, here: int
) -> int:
    """Processes for one of `here` training workers on this node; 0: a thread of the worker's own.

    As many as were asked for. Else the worker's share of the cores, without one for itself; none
    where a process would take longer to start than all there is to decode, or there is one core.
    """
    if asked:
        return asked
    pictures = split.features is None
    image_bytes = 3 * prod(split.preprocessing.shape) if pictures else split.image(0).nbytes
    passes = 1 if keeps(split, augment, image_bytes) else epochs
    if split.tar_bytes * passes < (PICTURE_BYTES if pictures else FEATURE_BYTES):
        return 0
    free = cores()
    return min(MOST_WORKERS, max(free // here - 1, 1)) if free > 1 else 0


def cores() -> int:
    """Cores that this process may use: those it is bound to, within its container's share."""
    bound = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file; "max"
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(share) // int(period)))
    return count
