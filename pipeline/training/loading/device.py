"""Batches go to the device while the step before runs."""

import logging
from collections import deque

import torch

from pipeline.training.data import Batch

log = logging.getLogger(__name__)


class Copies:
    """Copies of batches to a device, on a stream of their own; on the CPU a batch is used in place.

    The memory that a batch lies in is pinned when it is met first, so a copy holds up nobody; the
    batch is let go of when it has left. Not measured on a GPU: `python -m bench.gpu` does it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: set[int] = set()  # addresses of frames
        self._leaving: deque[tuple[torch.cuda.Event, Batch, torch.Tensor]] = deque()

    def begin(self, batch: Batch, size: int) -> Batch:
        """The batch on the device, perhaps not all of it yet; its frame has `size` bytes."""
        if self.stream is None:
            return batch
        images = batch.images
        self._pin(images.data_ptr(), size)
        with torch.cuda.stream(self.stream):
            batch.to(self.device)
        self._leaving.append((self.stream.record_event(), batch, images))
        return batch

    def here(self, batch: Batch) -> Batch:
        """The batch as steps may use it: they wait for the copy, the host does not."""
        if self.stream is None:
            return batch
        current = torch.cuda.current_stream(self.device)
        for copied, leaving, _ in self._leaving:
            if leaving is batch:
                current.wait_event(copied)
        for tensor in batch.tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(current)
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()
        return batch

    def close(self) -> None:
        """Wait for what is under way; frames are no longer pinned."""
        if self.stream is not None:
            self.stream.synchronize()
            self._leaving.clear()
            for address in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(address)
            self._pinned.clear()

    def _pin(self, address: int, size: int) -> None:
        if address not in self._pinned:
            code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            if code:  # copies are slower then, and right
                log.warning("batches cannot be pinned (CUDA error %d): their copies wait", code)
            self._pinned.add(address)
