"""Tars to batches: which samples a step sees, and how they are read.

The order is a pure function of the shards, the seed, the epoch and the step. It does not depend on
the number of workers: an epoch is dealt out to a fixed number of lanes, and worker r of W serves
lanes r, r + W, …
"""

import functools
import io
import json
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.models.vocabulary import Vocabulary
from pipeline.sharding import reading, shard
from pipeline.sharding.images import opened
from pipeline.storage import cache as _cache
from pipeline.storage import plan as _plan
from pipeline.training.augmentation import Augment

SHUFFLE_BLOCK = 4096  # samples permuted together: the shards of a block are read as one stretch
PREFETCH = 4  # batches made ahead of the model


@dataclass
class Batch:
    """Pairs of one worker at one step, in lane order."""

    images: torch.Tensor  # (n, 3, S, S) uint8 or (n, R, F) features
    words: torch.Tensor  # (n, L) word ids
    lengths: torch.Tensor  # (n,)
    image_rows: torch.Tensor  # (n,) the image's row in its split: equal rows, same image
    caption_rows: torch.Tensor  # (n,) the caption's row among the split's captions
    waited: float = 0.0  # seconds the model waited for it

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}

    def to(self, device: torch.device) -> "Batch":
        self.images = self.images.to(device, non_blocking=True)
        self.words = self.words.to(device, non_blocking=True)
        self.image_rows = self.image_rows.to(device, non_blocking=True)
        return self

    def split(self, size: int) -> list["Batch"]:
        """Batches of `size` pairs, the last of what is left."""
        parts = [
            {name: tensor[start : start + size] for name, tensor in self.tensors().items()}
            for start in range(0, len(self), size)
        ]
        return [Batch(**part) for part in parts]


class Split:
    """The samples of a split, addressed by row: sidecars in memory, image bytes in the tars."""

    def __init__(
        self,
        root: str,
        split: str,
        *,
        image_size: int,
        cache_mb: int = 1024,
        copies_gb: float = 0.0,
    ):
        index = _plan.need_index(_plan.folder(root, "shard"), "shard")
        self.shards = [entry for entry in _plan.of_split(index, split) if entry["samples"]]
        if not self.shards:
            known = sorted({entry["split"] for entry in index["pieces"]})
            raise InputError(f"no samples in split {split!r}; this run has {', '.join(known)}")
        names = [entry["name"] for entry in self.shards]
        self.tars = [_plan.folder(root, "shard", f"{name}.tar") for name in names]
        self.files = [entry["files"][f"{entry['name']}.tar"] for entry in self.shards]
        self.copies = copies_gb * 1e9
        columns = ["image_id", "captions", "member", "offset", "size"]
        tables = [
            shard.read_sidecar(_plan.folder(root, "shard", f"{name}.parquet"), columns)
            for name in names
        ]
        self.rows_per_shard = np.array([table.num_rows for table in tables])
        self.table = pa.concat_tables([t.replace_schema_metadata() for t in tables])
        captions = self.table["captions"].combine_chunks()
        self.captions = captions.flatten().field("text").to_pylist()
        self.caption_count = captions.value_lengths().to_numpy()
        self.caption_first = np.concatenate([[0], np.cumsum(self.caption_count)])[:-1]
        self.shard_of = np.repeat(np.arange(len(names)), self.rows_per_shard)
        self.offset = self.table["offset"].to_numpy()
        self.size = self.table["size"].to_numpy()
        self.image_size = image_size
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_mb * 2**20

    def __len__(self) -> int:
        return self.table.num_rows

    def payload(self, row: int) -> bytes:
        """The image file, or the feature array's .npy file, of a row."""
        number = self.shard_of[row]
        part = int(self.offset[row]), int(self.size[row])
        return _cache.read(self.tars[number], self.files[number], self.copies, *part)

    def image(self, row: int) -> np.ndarray:
        """The decoded image (3, S, S) uint8, or the feature array, of a row."""
        if (image := self._cache.get(row)) is None:
            image = decode(self.payload(row), self.image_size)
            if self._cache_left > image.nbytes:
                self._cache_left -= image.nbytes
                self._cache[row] = image
        return image

    @functools.cached_property
    def features(self) -> int | None:
        """Width of a region vector; None where the shards hold images."""
        return self.image(0).shape[-1] if self.table["member"][0].as_py().endswith(".npy") else None


def decode(data: bytes, size: int) -> np.ndarray:
    """A feature array as it was stored, or an image as (3, size, size) uint8."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data))
    image = opened(data)
    image.draft("RGB", (size, size))  # a JPEG decodes at the next larger eighth, for a fraction
    image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def stream(tar: str, *, image_size: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Every sample of a shard in order: its JSON member and its decoded image or features."""
    for sample in reading.stream(tar):
        payload = next(sample[suffix] for suffix in ("jpg", "png", "npy") if suffix in sample)
        yield json.loads(sample["json"]), decode(payload, image_size)


class Order:
    """Which pairs each step of an epoch sees.

    With `neighbours` (M, K), image rows near to each image and -1 where there are no more, images
    go through the epoch in groups of `group` that are near to each other, whichever shard they lie
    in.

    An epoch is a number of rounds; in a round every image is seen at most once, so two captions of
    one image never meet in a batch. With pairs="caption", round k shows the images that have more
    than k captions, each with another one of its captions. Only whole batches are made: up to
    batch_size - 1 images sit out a round, others in each.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        lanes: int,
        pairs: str,
        seed: int,
        group: int = 1,
        neighbours: np.ndarray | None = None,
    ):
        self.split, self.batch_size, self.lanes, self.seed = split, batch_size, lanes, seed
        self.group, self.neighbours = group, neighbours
        rounds = int(split.caption_count.max()) if pairs == "caption" else 1
        self.sizes = [int((split.caption_count > k).sum()) for k in range(rounds)]
        self.steps = sum(size // batch_size for size in self.sizes)
        if not self.steps:
            raise InputError(
                f"{len(split)} train images do not fill one batch of {batch_size}; "
                "lower --train.batch_size"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image rows, caption rows) of each step from `start`: (lanes, batch_size / lanes)."""
        for number, size in enumerate(self.sizes):
            steps = size // self.batch_size
            if start < steps:
                rows = self._round(epoch, number)[start:]
                captions = self._captions(rows, epoch, number)
                yield from zip(rows, captions, strict=True)
            start = max(0, start - steps)

    def _round(self, epoch: int, number: int) -> np.ndarray:
        """(steps, lanes, batch_size / lanes) image rows of one round."""
        rng = np.random.default_rng([self.seed, epoch, number])
        shards = rng.permutation(len(self.split.shards))
        ends = np.cumsum(self.split.rows_per_shard)
        starts = ends - self.split.rows_per_shard
        rows = np.concatenate([np.arange(starts[s], ends[s]) for s in shards])
        rows = rows[self.split.caption_count[rows] > number]
        rows = np.roll(rows, rng.integers(len(rows)))  # who sits out is drawn anew every round
        share = self.batch_size // self.lanes
        steps = len(rows) // self.batch_size
        if self.group > 1:
            rows = self._grouped(rng.permutation(rows))
        lanes = rows[: steps * self.batch_size].reshape(self.lanes, -1, self.group).copy()
        for lane in lanes:
            for start in range(0, len(lane), SHUFFLE_BLOCK):
                rng.shuffle(lane[start : start + SHUFFLE_BLOCK])
        return lanes.reshape(self.lanes, steps, share).transpose(1, 0, 2)

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        """The rows again, first in groups of neighbours, then those whose group is not full."""
        free = np.zeros(len(self.split), bool)
        free[rows] = True
        full, rest = [], []
        for row in rows:
            if not free[row]:
                continue
            free[row], group = False, [row]
            for near in self.neighbours[row]:
                if near >= 0 and free[near] and len(group) < self.group:
                    free[near] = False
                    group.append(near)
            (full if len(group) == self.group else rest).append(group)
        return np.array([row for group in [*full, *rest] for row in group])

    def _captions(self, rows: np.ndarray, epoch: int, number: int) -> np.ndarray:
        """Caption rows: every image goes through its captions from a start drawn per epoch."""
        counts = self.split.caption_count[rows]
        return self.split.caption_first[rows] + (_hash(rows, self.seed, epoch) + number) % counts


def _hash(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A well-mixed number below 2**31 for every row (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) + np.uint64((seed * 1_000_003 + epoch + 1) % 2**63)
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(33)).astype(np.int64)


class Loader:
    """Batches of one worker, made ahead of the model by threads."""

    def __init__(
        self,
        order: Order,
        vocabulary: Vocabulary,
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
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        try:
            with ThreadPoolExecutor(self.threads) as pool:
                mine = list(self.lanes)
                for rows, captions in self.order.epoch(epoch, start):
                    if stop.is_set():
                        return
                    pairs = rows[mine].reshape(-1), captions[mine].reshape(-1)
                    put(self._batch(*pairs, epoch, pool))
            put(None)
        except BaseException as error:  # handed to the training loop, which raises it
            put(error)

    def _batch(self, rows: np.ndarray, captions: np.ndarray, epoch: int, pool) -> Batch:
        # One task a thread: handing over each sample costs a fifth of decoding it.
        parts = np.array_split(np.stack([rows, captions], 1), self.threads)
        made = pool.map(lambda part: [self._image(*pair, epoch) for pair in part.tolist()], parts)
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
