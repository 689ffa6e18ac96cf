"""What becomes of a part of a batch: pictures, cropped and so on, and word ids, in its frame."""

import os
import pickle
import time
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import Known
from pipeline.sharding.decoding import decode, put
from pipeline.storage import cache
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.frames import Frames, Layout, mapped, memory_file

Place = tuple[int, str, dict, int, int]  # a tar's number, URI and index entry, offset and bytes


@dataclass(frozen=True)
class PairSettings:
    """What is made of every pair, in every process alike."""

    layout: Layout
    preprocessing: Preprocessing
    augment: Augment | None
    seed: int
    max_words: int | None
    copies: float  # bytes that copies of remote tars may take on this node


class Part(NamedTuple):
    """Pairs of a batch that are made together."""

    task: int  # the batch
    frame: int
    first: int  # place of the first of them in the frame
    epoch: int
    rows: list[int]  # of images
    captions: list[int]  # rows of captions
    held: list[bool]  # decoded before, and kept
    places: list[Place]
    texts: list[str]


class Made(NamedTuple):
    """What is said of a part when it is done."""

    task: int
    first: int
    pairs: int = 0  # none of a part that failed, or that nobody waits for any more
    busy: float = 0.0  # seconds
    reading: float = 0.0  # seconds of them
    failed: tuple[int, bool, Exception] | None = None  # image row, whether in reading, and why


class Shared:
    """What a pool's processes know of each other, and the images that were decoded already."""

    def __init__(self, workers: int, tars: int, kept: int, layout: Layout, file: int | None = None):
        self.workers, self.tars, self.kept = workers, tars, kept
        head = 8 * (1 + workers) + tars
        self._head = -(-head // 64) * 64
        size = self._head + kept * layout.image_bytes
        self.file = memory_file(size) if file is None else file
        weakref.finalize(self, os.close, self.file)
        memory = np.frombuffer(mapped(self.file, size), np.uint8)
        numbers = memory[: 8 * (1 + workers)].view(np.int64)
        self.oldest = numbers[:1]  # the first batch that is waited for
        self.at = numbers[1:]  # 1 + image row that a process is at; 0: none
        self.whole = memory[8 * (1 + workers) : head]  # tars whose copies were compared
        images = memory[self._head :].view(layout.dtype)
        self.decoded = images.reshape(kept, *layout.shape)


class Maker:
    """Makes parts of batches, in one process or thread."""

    def __init__(
        self, settings: PairSettings, words: Known, frames: Frames, shared: Shared, number: int
    ):
        self.settings, self.words, self.frames = settings, words, frames
        self.shared, self.number = shared, number
        self._reading, self._in_reading = 0.0, False

    def make(self, part: Part) -> Made:
        """Fill the part's place in its frame; what went wrong is said, not raised."""
        if part.task < self.shared.oldest[0]:
            return Made(part.task, part.first)
        started, row = time.perf_counter(), part.rows[0]
        self._reading, self._in_reading = 0.0, False
        images, ids, lengths = self.frames.views(part.frame)
        try:
            pairs = zip(part.rows, part.captions, part.held, part.places, strict=True)
            for k, (row, caption, held, place) in enumerate(pairs, part.first):
                self.shared.at[self.number] = row + 1
                self._image(images[k], row, [self.settings.seed, part.epoch, caption], held, place)
            self.shared.at[self.number] = 0
            for k, found in enumerate(
                self.words.ids(part.texts, self.settings.max_words), part.first
            ):
                ids[k, len(found) :] = self.words.fill
                ids[k, : len(found)] = found
                lengths[k] = len(found)
        except Exception as error:
            failed = row, self._in_reading, _sendable(error)
            return Made(part.task, part.first, failed=failed)
        busy = time.perf_counter() - started
        return Made(part.task, part.first, len(part.rows), busy, self._reading)

    def _image(self, out: np.ndarray, row: int, draw: list[int], held: bool, place: Place) -> None:
        """The image of a pair, as drawn for its caption and epoch: once an epoch."""
        if held:
            out[:] = self.shared.decoded[row]
            return
        data, how = self._read(place), self.settings.preprocessing
        if self.settings.augment is not None:
            put(self.settings.augment(data, how, draw), out)
            return
        image = decode(data, how)
        if image.shape != out.shape or image.dtype != out.dtype:
            found, first = (f"{x.dtype} of shape {list(x.shape)}" for x in (image, out))
            raise InputError(f"it is {found}, the first image of the split {first}")
        put(image, out)
        if row < self.shared.kept:
            self.shared.decoded[row] = out

    def _read(self, place: Place) -> bytes:
        number, tar, file, offset, size = place
        started, self._in_reading = time.perf_counter(), True
        if self.shared.whole[number]:
            cache.trust(file)
        data = cache.read(tar, file, self.settings.copies, offset, size)
        self.shared.whole[number] = 1
        if len(data) < size:
            raise InputError(
                f"{tar} has {len(data):,} bytes from {offset:,} on where {size:,} were written; "
                "delete it and run `halftone shard` again"
            )
        self._reading += time.perf_counter() - started
        self._in_reading = False
        return data


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of another library's errors some cannot be taken apart and put together
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
