"""Threads that make the batches of a worker, in order, ahead of the steps."""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.models.vocabulary import PretrainedTokens, Vocabulary
from pipeline.training.augmentation import Augment
from pipeline.training.data import Batch
from pipeline.training.sampler import Sampler

PREFETCH = 4  # batches made ahead of the model


class Loader:
    """Batches of one worker, made ahead of the model by threads."""

    def __init__(
        self,
        order: Sampler,
        vocabulary: Vocabulary | PretrainedTokens,
        *,
        rank: int,
        size: int,
        max_words: int,
        threads: int,
        augment: Augment | None = None,
    ):
        self.order, self.split, self.augment = order, order.split, augment
        self.lanes = range(rank, order.lanes, size)
        self.threads = threads
        self.vocabulary, self.max_words = vocabulary, max_words

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from step `start` on."""
        ready: queue.Queue = queue.Queue(PREFETCH)
        stop = threading.Event()
        maker = threading.Thread(target=self._fill, args=(ready, stop, epoch, start), daemon=True)
        maker.start()
        try:
            while True:
                started = time.perf_counter()
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                item.waited = time.perf_counter() - started
                yield item
        finally:
            stop.set()

    def _fill(self, ready: queue.Queue, stop: threading.Event, epoch: int, start: int) -> None:
        def put(item) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        try:
            with ThreadPoolExecutor(self.threads) as pool:
                for rows, captions in self.order.epoch(epoch, start):
                    if stop.is_set():
                        return
                    mine = list(self.lanes)
                    pairs = rows[mine].reshape(-1), captions[mine].reshape(-1)
                    put(self._batch(*pairs, epoch, pool))
            put(None)
        except BaseException as error:  # handed to the training loop, which raises it
            put(error)

    def _batch(self, rows: np.ndarray, captions: np.ndarray, epoch: int, pool) -> Batch:
        # One task a thread: handing over each sample costs a fifth of decoding it.
        parts = np.array_split(np.stack([rows, captions], 1), self.threads)
        made = pool.map(lambda part: [self._image(r, c, epoch) for r, c in part.tolist()], parts)
        images = [image for part in made for image in part]
        texts = [self.split.captions[row] for row in captions]
        words, lengths = self.vocabulary.encode(texts, self.max_words)
        return Batch(
            images=torch.from_numpy(np.stack(images)),
            words=words,
            lengths=lengths,
            image_rows=torch.from_numpy(rows),
            caption_rows=torch.from_numpy(captions),
        )

    def _image(self, row: int, caption: int, epoch: int) -> np.ndarray:
        """The image of a pair, cropped and so on as drawn for its caption and epoch."""
        if self.augment is None:
            return self.split.image(row)
        draw = [self.order.seed, epoch, caption]  # a pair is drawn once an epoch
        return self.augment(self.split.payload(row), self.split.image_size, draw)
