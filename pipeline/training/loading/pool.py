"""Who makes batches: processes that live as long as the training, or a thread of this process."""

import contextlib
import json
import os
import pickle
import queue
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe

from pipeline.errors import Unreachable
from pipeline.texts.vocabulary import Known
from pipeline.training.loading.frames import Frames, memory_file
from pipeline.training.loading.making import Made, Maker, Part, Recipe, Shared
from pipeline.training.loading.process import START, TOKEN

PATIENCE = 10  # seconds for a process to end by itself
# A process decodes on one core; what would start threads of its own is told so.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class ProcessLost(Unreachable):
    """A decoding process was killed: with the same input another try may do better."""


class Thread:
    """Parts are made by a thread of this process: for trainings that end before a process pays."""

    def __init__(self, recipe: Recipe, words: Known, frames: Frames, shared: Shared):
        self.given: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self.made: queue.SimpleQueue[Made] = queue.SimpleQueue()
        maker = Maker(recipe, words, frames, shared, 0)
        work = (maker.make, self.given, self.made)
        threading.Thread(target=_make_all, args=work, daemon=True).start()

    def give(self, parts: list[Part]) -> None:
        for part in parts:
            self.given.put(part)

    def take(self, wait: bool) -> list[Made]:
        """Parts that were made; with `wait` at least one."""
        found = [self.made.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.made.get_nowait())
        return found

    def close(self) -> None:
        self.given.put(None)


def _make_all(make: Callable[[Part], Made], given: queue.SimpleQueue, made: queue.SimpleQueue):
    while (part := given.get()) is not None:
        made.put(make(part))


class Processes:
    """Parts are made by processes, each taking the next one when it has made the last.

    They are started anew (no fork: the parent may hold CUDA, Ray and threads), import no torch, and
    get files of memory and pipes by their descriptors. `name` says what an image row is called.
    """

    def __init__(
        self,
        recipe: Recipe,
        words: Known,
        frames: Frames,
        shared: Shared,
        name: Callable[[int], str],
    ):
        self.frames, self.shared, self.name = frames, shared, name
        about = shared.workers, shared.tars, shared.kept, recipe.layout, shared.file
        setup = memory_file()
        with open(setup, "wb", closefd=False) as file:
            file.write(pickle.dumps((recipe, words.state, frames.file, about)))
        read, self._tokens = os.pipe()
        self._waiting = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen] = []
        self._answers: list[Connection] = []
        for number in range(shared.workers):
            answers, said = Pipe(duplex=False)
            files = {"tokens": read, "answers": said.fileno(), "setup": setup}
            given = {"path": sys.path, "given": {"number": number, **files}}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", START, json.dumps(given)],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **ALONE},
                    pass_fds=[*files.values(), frames.file, shared.file],
                )
            )
            said.close()
            self._answers.append(answers)
            self._waiting.register(answers, selectors.EVENT_READ, number)
        os.close(read)
        os.close(setup)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def give(self, parts: list[Part]) -> None:
        """Parts of one batch, to whichever process is free first."""
        described = [pickle.dumps(part, pickle.HIGHEST_PROTOCOL) for part in parts]
        place, tokens = self.frames.ask(parts[0].frame, b"".join(described)), []
        for data in described:
            tokens.append(TOKEN.pack(place, len(data), 0, 0))
            place += len(data)
        with contextlib.suppress(BrokenPipeError):  # all are dead: `take` says so
            os.write(self._tokens, b"".join(tokens))

    def take(self, wait: bool) -> list[Made]:
        """Parts that were made; with `wait` at least one. Raises `ProcessLost`."""
        found = []
        for key, _ in self._waiting.select(None if wait else 0):
            answers = self._answers[key.data]
            try:
                found.append(answers.recv())
                while answers.poll():
                    found.append(answers.recv())
            except (EOFError, OSError):
                raise self._lost(key.data) from None
        return found

    def _lost(self, number: int) -> ProcessLost:
        process, row = self._processes[number], int(self.shared.at[number]) - 1
        code = process.wait(PATIENCE)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"
        how += ", as the kernel does when memory is short," if code == -signal.SIGKILL else ""
        at = f"while it was at {self.name(row)}" if row >= 0 else "between two images"
        return ProcessLost(
            f"decoding process {process.pid} {how} {at}; start the training again, it goes on from "
            "its newest checkpoint (fewer --train.decode_workers take less memory)"
        )

    def close(self) -> None:
        """End the processes; parts that were not made are not."""
        self.shared.oldest[0] = 2**62
        self._waiting.close()
        with contextlib.suppress(OSError):
            os.close(self._tokens)
        for answers in self._answers:
            answers.close()
        for process in self._processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
