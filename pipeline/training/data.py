"""Tars to batches: which samples a step sees, and how they are read.

The order is a pure function of the shards, the seed, the epoch and the step. It does not depend on
the number of workers: an epoch is dealt out to a fixed number of lanes, and worker r of W serves
lanes r, r + W, …
"""

import functools
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.errors import InputError
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.vocabulary import Known, count_words
from pipeline.sharding import sidecar
from pipeline.sharding.decoding import decode
from pipeline.sharding.mapped_samples import mapped_samples
from pipeline.storage import cache, run_folder, store
from pipeline.storage.mapped import Rows
from pipeline.storage.piece_table import column, sizes, split_names, where
from pipeline.storage.run_folder import RunFolder
from pipeline.training.distributed import ProcessGroup

LOG = logging.getLogger(__name__)
LOOKED_AT = 100_000  # captions of a split that are looked at for how many are cut
WORDS = "words.json"  # how often each word is in the train captions


@dataclass
class Batch:
    """Pairs of one worker at one step, in lane order."""

    images: torch.Tensor  # (n, 3, H, W) uint8 or (n, R, F) features
    words: torch.Tensor  # (n, L) word ids
    lengths: torch.Tensor  # (n,)
    image_rows: torch.Tensor  # (n,) the image's row in its split: equal rows, same image
    caption_rows: torch.Tensor  # (n,) the caption's row among the split's captions

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}

    def to(self, device: torch.device) -> "Batch":
        for name in ("words", "image_rows", "images"):  # what is not pinned first
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self

    def split(self, size: int) -> list["Batch"]:
        """Batches of `size` pairs, the last of what is left."""
        parts = zip(*(tensor.split(size) for tensor in self.tensors().values()), strict=True)
        return [Batch(*part) for part in parts]


def captions_of(root: str, split: str) -> Iterator[str]:
    """The texts of a split's captions, in order, a shard at a time."""
    run = RunFolder(root)
    for name in column(run_folder.of_split(run.index("shard"), split), "name"):
        uri = run.folder("shard", f"{name}.parquet")
        yield from texts_of(sidecar.read_sidecar(uri, ["captions"])["captions"]).to_pylist()


def texts_of(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts of samples' captions, one after the other."""
    return pa.chunked_array([c.flatten().field("text") for c in captions.chunks] or [[]])


class Split:
    """The samples of a split, addressed by row: what the index says of its shards is in memory.

    Images are numbered through the shards, and so are their captions. A shard's captions, and where
    its images lie in the tar, are mapped from this machine's cache while batches draw from it.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        preprocessing: Preprocessing,
        cache_mb: int = 1024,
        copies_gb: float = 0.0,
    ):
        run = RunFolder(root)
        index = run.index("shard")
        self.shards = where(run_folder.of_split(index, split), "samples")
        if not len(self.shards):
            known = sorted(split_names(index["pieces"]))
            raise InputError(f"no samples in split {split!r}; this run has {', '.join(known)}")
        names = column(self.shards, "name")
        self.tars = [run.folder("shard", f"{name}.tar") for name in names]
        self.sidecars = [run.folder("shard", f"{name}.parquet") for name in names]
        self.models = run.folder("train")
        self.copies = copies_gb * 1e9
        self.images = Rows(column(self.shards, "samples"))
        self.texts_of_shards = Rows(column(self.shards, "captions"))
        self.captions = Texts(self)
        self.preprocessing = preprocessing
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_mb * 2**20

    def __len__(self) -> int:
        return len(self.images)

    def table(self, shard: int) -> pa.Table:
        """The samples of a shard: image_id, captions, member, offset and size, mapped."""
        entry = self.shards[shard]
        file = entry["files"][f"{entry['name']}.parquet"]
        return mapped_samples(self.sidecars[shard], file, self.copies)

    @functools.cached_property
    def having(self) -> np.ndarray:
        """Images (S, K) of every shard that have more than k captions."""
        known = column(self.shards, "images_with")
        counts = [self._images_with(*numbered) for numbered in enumerate(known)]
        most = max(max(of_shard) for of_shard in counts)
        having = np.zeros((len(counts), most), np.int64)
        for row, of_shard in zip(having, counts, strict=True):
            for captions, images in of_shard.items():
                row[:captions] += images
        return having

    def _images_with(self, shard: int, known: dict | None) -> dict[int, int]:
        """How many images of a shard have how many captions; `known` where its entry says so."""
        if known is not None:
            return {int(captions): images for captions, images in known.items()}
        entry = self.shards[shard]
        if entry["captions"] == entry["samples"]:  # there is no sample without a caption
            return {1: entry["samples"]}
        captions = sidecar.read_sidecar(self.sidecars[shard], ["captions"])["captions"]
        lengths, images = np.unique(pc.list_value_length(captions).to_numpy(), return_counts=True)
        return dict(zip(lengths.tolist(), images.tolist(), strict=True))

    def images_having(self, shard: int, more_than: int) -> np.ndarray:
        """The rows of a shard's images that have more captions than that, in order."""
        first, count = self.images.starts[shard], self.images.counts[shard]
        if self.having[shard, more_than] == count:
            return np.arange(first, first + count)
        ends = self._ends(shard)
        return first + np.flatnonzero(np.diff(ends) > more_than)

    def captions_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first caption's row and the number of captions, (n,) each, of images (n,)."""
        first, count = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for shard, places, of_shard in self.images.by_shard(rows):
            ends = self._ends(shard)
            first[places] = ends[of_shard] + self.texts_of_shards.starts[shard]
            count[places] = ends[of_shard + 1] - ends[of_shard]
        return first, count

    def _ends(self, shard: int) -> np.ndarray:
        """Where the captions of each image of a shard begin, and the last one's end."""
        offsets = self.table(shard)["captions"].chunk(0).offsets.to_numpy()
        return offsets - offsets[0]

    @property
    def caption_count(self) -> np.ndarray:
        """Captions (M,) of every image: of a split that is small."""
        return np.concatenate([np.diff(self._ends(shard)) for shard in range(len(self.shards))])

    def texts(self, rows: np.ndarray) -> list[str]:
        """The texts of captions (n,)."""
        out: list[str] = [""] * len(rows)
        for shard, places, of_shard in self.texts_of_shards.by_shard(np.asarray(rows)):
            texts = texts_of(self.table(shard)["captions"]).take(pa.array(of_shard)).to_pylist()
            for place, text in zip(places.tolist(), texts, strict=True):
                out[place] = text
        return out

    def places(self, rows: np.ndarray) -> list[tuple[int, str, dict, int, int]]:
        """Where each row's payload lies: its tar's number, URI and index entry, offset and size."""
        out: list[tuple[int, str, dict, int, int]] = [None] * len(rows)  # type: ignore[list-item]
        for shard, places, of_shard in self.images.by_shard(rows):
            found = (
                self.table(shard).select(["offset", "size"]).take(pa.array(of_shard)).to_pydict()
            )
            entry = self.shards[shard]
            tar = shard, self.tars[shard], entry["files"][f"{entry['name']}.tar"]
            for place, *part in zip(places.tolist(), *found.values(), strict=True):
                out[place] = *tar, *part
        return out

    def name(self, row: int) -> str:
        """What an image is called, and the tar it lies in, for a person to find it."""
        ((shard, _, (of_shard,)),) = self.images.by_shard(np.array([row]))
        return f"{self.table(shard)['member'][of_shard].as_py()} of {self.tars[shard]}"

    @property
    def tar_bytes(self) -> int:
        """Bytes of all tars together."""
        return sum(size for name, size in sizes(self.shards) if name.endswith(".tar"))

    def payload(self, row: int) -> bytes:
        """The image file, or the feature array's .npy file, of a row."""
        ((_, tar, file, *part),) = self.places(np.array([row]))
        return cache.read(tar, file, self.copies, *part)

    def image(self, row: int) -> np.ndarray:
        """The decoded image (3, H, W) uint8, or the feature array, of a row."""
        if (image := self._cache.get(row)) is None:
            image = decode(self.payload(row), self.preprocessing)
            if self._cache_left > image.nbytes:
                self._cache_left -= image.nbytes
                self._cache[row] = image
        return image

    @functools.cached_property
    def features(self) -> int | None:
        """Width of a region vector; None where the shards hold images."""
        member = self.table(0)["member"][0].as_py()
        return self.image(0).shape[-1] if member.endswith(".npy") else None


class Texts(Sequence[str]):
    """The captions of a split as a list of strings that is not held."""

    def __init__(self, split: Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split.texts_of_shards)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.split.texts(np.arange(*row.indices(len(self))))
        return self.split.texts(np.array([row]))[0]

    def __iter__(self) -> Iterator[str]:
        for shard in range(len(self.split.shards)):
            yield from self.of_shard(shard).to_pylist()

    def of_shard(self, shard: int) -> pa.ChunkedArray:
        """The texts of a shard, read from storage and not kept here."""
        uri = self.split.sidecars[shard]
        return texts_of(sidecar.read_sidecar(uri, ["captions"])["captions"])


def word_counts(split: Split, world: ProcessGroup, keep: bool = True) -> Counter[str]:
    """How often each word is in a split's captions: counted once, kept beside the models (`keep`).

    The workers count a share of the shards each.
    """
    uri = store.join(split.models, WORDS)
    of = store.fingerprint("words", 1, run_folder.version(split.shards))
    found = store.read_json(uri) if store.exists(uri) else {}
    if all(world.gather_objects(found.get("of") == of)):
        return Counter(found["words"])
    shards = range(world.rank, len(split.shards), world.size)
    texts = (split.captions.of_shard(shard).to_pylist() for shard in shards)
    counts: Counter[str] = Counter()
    for of_worker in world.gather_objects(count_words(itertools.chain.from_iterable(texts))):
        counts.update(of_worker)
    if keep and world.rank == 0:
        store.write_bytes(uri, json.dumps({"of": of, "words": counts}, ensure_ascii=False).encode())
    return counts


def cut_captions(split: Split, words: Known, max_words: int | None) -> tuple[int, int]:
    """How many captions lose their end, of how many: the first ones of a large split.

    Where any do it is told in the log.
    """
    cut = known = 0
    for shard in range(len(split.shards)):
        if known >= LOOKED_AT:
            break
        texts = split.captions.of_shard(shard).to_pylist()
        cut, known = cut + words.cut(texts, max_words), known + len(texts)
    if cut:
        LOG.warning(
            "%s of %s train captions are cut after %s words or tokens (--model.max_words)",
            *(f"{number:,}" for number in (cut, known, words.longest(max_words))),
        )
    return cut, known
