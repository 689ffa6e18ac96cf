"""Tars to batches: which samples a step sees, and how they are read.

The order is a pure function of the shards, the seed, the epoch and the step. It does not depend on
the number of workers: an epoch is dealt out to a fixed number of lanes, and worker r of W serves
lanes r, r + W, …
"""

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline.errors import InputError
from pipeline.sharding import sidecar
from pipeline.sharding.decoding import decode
from pipeline.storage import cache, run_folder
from pipeline.storage.run_folder import RunFolder


@dataclass
class Batch:
    """Pairs of one worker at one step, in lane order."""

    images: torch.Tensor  # (n, 3, S, S) uint8 or (n, R, F) features
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


def captions_of(root: str, split: str) -> list[str]:
    """The texts of a split's captions, in order."""
    run = RunFolder(root)
    names = [entry["name"] for entry in run_folder.of_split(run.index("shard"), split)]
    tables = [
        sidecar.read_sidecar(run.folder("shard", f"{n}.parquet"), ["captions"]) for n in names
    ]
    return [c["text"] for table in tables for row in table["captions"].to_pylist() for c in row]


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
        run = RunFolder(root)
        index = run.index("shard")
        self.shards = [entry for entry in run_folder.of_split(index, split) if entry["samples"]]
        if not self.shards:
            known = sorted({entry["split"] for entry in index["pieces"]})
            raise InputError(f"no samples in split {split!r}; this run has {', '.join(known)}")
        names = [entry["name"] for entry in self.shards]
        self.tars = [run.folder("shard", f"{name}.tar") for name in names]
        self.files = [entry["files"][f"{entry['name']}.tar"] for entry in self.shards]
        self.copies = copies_gb * 1e9
        columns = ["image_id", "captions", "member", "offset", "size"]
        sidecars = [run.folder("shard", f"{name}.parquet") for name in names]
        tables = [sidecar.read_sidecar(uri, columns) for uri in sidecars]
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

    def places(self, rows: np.ndarray) -> list[tuple[int, str, dict, int, int]]:
        """Where each row's payload lies: its tar's number, URI and index entry, offset and size."""
        shards = self.shard_of[rows].tolist()
        parts = zip(shards, self.offset[rows].tolist(), self.size[rows].tolist(), strict=True)
        return [(n, self.tars[n], self.files[n], offset, size) for n, offset, size in parts]

    def texts(self, caption_rows: np.ndarray) -> list[str]:
        """The texts of captions."""
        return [self.captions[row] for row in caption_rows.tolist()]

    def name(self, row: int) -> str:
        """What an image is called, and the tar it lies in, for a person to find it."""
        member = self.table["member"][row].as_py()
        return f"{member} of {self.tars[self.shard_of[row]]}"

    @property
    def tar_bytes(self) -> int:
        """Bytes of all tars together."""
        return sum(file["bytes"] for file in self.files)

    def payload(self, row: int) -> bytes:
        """The image file, or the feature array's .npy file, of a row."""
        ((_, tar, file, *part),) = self.places(np.array([row]))
        return cache.read(tar, file, self.copies, *part)

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
