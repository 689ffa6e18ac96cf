"""How long work takes on a device, and how much of its memory."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def wait(device: torch.device) -> None:
    """Until everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Work, device: torch.device, times: int = 20, seconds: float = 0.4) -> float:
    """The median of a few runs, as many as fit into the seconds, after two that do not count."""
    for _ in range(2):
        work()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or (len(taken) < times and time.perf_counter() - began < seconds):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def megabytes(work: Work, device: torch.device) -> float | None:
    """Peak beyond what was held before (MiB); None where the device does not count."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def busy(work: Work, device: torch.device) -> float | None:
    """Share of the time (0-1) in which the device computed; None where it does not tell."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        whole = 1e6 * (time.perf_counter() - started)
    on_device = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == on_device and "Memcpy" not in event.name
    )
    covered, until = 0.0, 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / whole
