"""Memory that processes share, in frames of one size: a frame holds a batch."""

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ALIGNED = 64  # bytes; where an array of a frame may begin
ASKED = 256  # bytes a pair that a frame has for what is asked for: places and captions


class Views(NamedTuple):
    """The arrays of a frame."""

    images: np.ndarray  # (n, …)
    ids: np.ndarray  # (n, longest) int64, of words or tokens
    lengths: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class Layout:
    """What a frame has room for."""

    pairs: int
    shape: tuple[int, ...]  # of an image
    dtype: str
    longest: int  # ids of a caption

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Where images, ids and lengths end in a frame, and the frame (bytes)."""
        ends, at = [], 0
        for size in (self.image_bytes, 8 * self.longest, 8):
            at += -(-size * self.pairs // ALIGNED) * ALIGNED
            ends.append(at)
        return ends[0], ends[1], at, _pages(at + ASKED * self.pairs)

    def views(self, memory: np.ndarray) -> Views:
        """The arrays that lie in a frame's bytes."""
        n, (images, ids, _, _) = self.pairs, self.parts
        return Views(
            memory[: n * self.image_bytes].view(self.dtype).reshape(n, *self.shape),
            memory[images : images + 8 * n * self.longest].view(np.int64).reshape(n, self.longest),
            memory[ids : ids + 8 * n].view(np.int64),
        )


def memory_file(size: int = 0) -> int:
    """A descriptor of memory without a name, gone with the last process that holds it.

    It is none of /dev/shm, which containers keep small. Where the kernel has no such memory, it is
    a file of the temporary folder that was unlinked.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("halftone")
    else:
        with tempfile.TemporaryFile() as unlinked:
            file = os.dup(unlinked.fileno())
    os.ftruncate(file, size)
    return file


def mapped(file: int, size: int, offset: int = 0) -> mmap.mmap:
    """Bytes of a memory file, shared with all who map them."""
    return mmap.mmap(file, size, offset=offset)


def _pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


class Frames:
    """Frames of a memory file. One process takes and frees them, others know them by number."""

    def __init__(self, layout: Layout, file: int | None = None):
        self.layout, self.size = layout, layout.parts[-1]
        self.file = memory_file() if file is None else file
        self._maps: dict[int, mmap.mmap] = {}
        self._free: list[int] = []
        self._end = 0  # of the file
        self._asked: dict[int, tuple[int, int]] = {}  # of a frame: where, and how many bytes

    def take(self) -> int:
        """A frame that nobody uses, a new one if there is none: the number is its offset."""
        if self._free:
            return self._free.pop()
        offset = self._more(self.size)
        self._asked[offset] = offset + self.layout.parts[2], self.size - self.layout.parts[2]
        return offset

    def free(self, frame: int) -> None:
        self._free.append(frame)

    def bytes(self, frame: int) -> np.ndarray:
        """A frame's bytes, as a new array each time."""
        if frame not in self._maps:
            self._maps[frame] = mapped(self.file, self.size, frame)
        return np.frombuffer(self._maps[frame], np.uint8)

    def views(self, frame: int) -> Views:
        return self.layout.views(self.bytes(frame))

    def lend(self, frame: int) -> Views:
        """The arrays of a frame, which is free again when the last of them is gone."""
        memory = self.bytes(frame)
        weakref.finalize(memory, self._free.append, frame).atexit = False
        return self.layout.views(memory)

    def ask(self, frame: int, data: bytes) -> int:
        """Write what a frame is to be filled with; the place in the file."""
        place, room = self._asked[frame]
        if len(data) > room:  # very long captions
            room = 2 * len(data)
            place = self._more(room)
            self._asked[frame] = place, room
        os.pwrite(self.file, data, place)
        return place

    def _more(self, size: int) -> int:
        start = self._end
        self._end += _pages(size)
        os.ftruncate(self.file, self._end)
        return start
