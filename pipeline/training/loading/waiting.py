"""How long a device had nothing to do, and what it waited for."""

import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds inside `with` blocks: of the device's own time where it is CUDA, else of this thread.

    A block that the host is through with long before the device comes to it takes no time, however
    long the host was in it; reading `seconds` waits for no device and may miss the last blocks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> "Stopwatch":
        self._begun = self._now()
        return self

    def __exit__(self, *error) -> None:
        ended = self._now()
        if self.device.type != "cuda":
            self._seconds += ended - self._begun
            return
        self._events.append((self._begun, ended))
        self._fold()

    @property
    def seconds(self) -> float:
        self._fold()
        return self._seconds

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _fold(self) -> None:
        while self._events and self._events[0][1].query():
            begun, ended = self._events.popleft()
            self._seconds += begun.elapsed_time(ended) / 1000


def watched(batches: Iterator, waiting: Stopwatch) -> Iterator:
    """The batches; what the device has nothing to do meanwhile is on the stopwatch."""
    while True:
        with waiting:
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def figures(shares_W4: torch.Tensor) -> dict[str, float]:
    """An epoch's record of waiting, by each worker's shares of its time.

    They are: its device waiting for data, its decoding processes busy, in storage, and waiting for
    other workers.
    """
    worst = shares_W4[int(shares_W4[:, 0].argmax())].tolist()
    return {
        "train/data_wait": float(shares_W4[:, 0].mean()),
        "train/data_wait_worst": worst[0],
        "train/decode_busy": worst[1],  # of the worker that waits most: it holds up the others
        "train/storage_busy": worst[2],
        "train/exchange_wait": float(shares_W4[:, 3].mean()),
    }
