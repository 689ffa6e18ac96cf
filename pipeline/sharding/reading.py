"""The shards of a run folder, read from one's own code: by name, one sample, or as a stream.

shards = Shards("runs/mine")                     # or s3://bucket/runs/mine
shards.names("train")                            # ['train-000000', 'train-000001', …]
shards.sample("1000268201").load().show()        # reads this picture's bytes and no others
webdataset.DataPipeline(lambda: shards.stream("train"), webdataset.decode("pil"), …)
"""

import functools
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import InputError, did_you_mean
from pipeline.sharding import sidecar
from pipeline.sharding.images import open_picture
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder

COLUMNS = ["image_id", "key", "captions", "split", "member", "offset", "size", "sha256"]


@dataclass(frozen=True)
class Sample:
    """A sample as its shard's sidecar describes it; its bytes are read when they are asked for."""

    image_id: str
    key: str  # its name in the tar
    captions: list[dict]  # {"caption_id": …, "text": …}
    split: str
    member: str  # KEY.jpg, KEY.png or KEY.npy
    offset: int  # of the member's first byte of data in the tar
    size: int  # bytes
    sha256: str  # of those bytes
    tar: str  # URI

    def read(self) -> bytes:
        """The image file's or feature file's bytes: one range read, checked by their hash."""
        data = store.read_bytes(self.tar, self.offset, self.size)
        if store.sha256(data) != self.sha256:
            raise InputError(
                f"{self.member} in {self.tar} has other bytes than when it was written; "
                "delete the tar and run `halftone shard` again"
            )
        return data

    def load(self) -> Image.Image | np.ndarray:
        """The picture, or the feature array (R, F)."""
        data = self.read()
        return np.load(io.BytesIO(data)) if self.member.endswith(".npy") else open_picture(data)


class Shards:
    """The shards of a finished `halftone shard`."""

    def __init__(self, root: str):
        run = RunFolder(store.absolute(str(root)))
        self.folder, self.index = run.folder("shard"), run.index("shard")
        self.entries = {entry["name"]: entry for entry in self.index["pieces"]}

    def names(self, split: str | None = None) -> list[str]:
        """Names of the shards, of one split or of all, in order."""
        splits = {entry["split"]: None for entry in self.entries.values()}
        if split is not None and split not in splits:
            raise InputError(f"no split {split!r} in {self.folder}{did_you_mean(split, splits)}")
        return [name for name, e in self.entries.items() if split in (None, e["split"])]

    def tar(self, name: str) -> str:
        """URI of a shard's tar."""
        return self._uri(name, "tar")

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard's sidecar (schemas/shard.py): its samples in the tar's order."""
        return sidecar.read_sidecar(self._uri(name, "parquet"), columns)

    def samples(self, split: str | None = None) -> Iterator[Sample]:
        """Every sample of the shards, in order; no tar is opened."""
        for name in self.names(split):
            for row in self.table(name, COLUMNS).to_pylist():
                yield Sample(**row, tar=self.tar(name))

    def sample(self, image_id: str) -> Sample:
        """The sample of one image. The first call reads all sidecars, the others nothing."""
        table, rows, tars = self._rows
        if image_id not in rows:
            raise InputError(
                f"no sample {image_id!r} among the {len(rows)} in {self.folder}; give an image_id "
                "of the manifest (of a rejected one its shard's sidecar has the reason)"
            )
        row = rows[image_id]
        (values,) = table.slice(row, 1).to_pylist()
        return Sample(**values, tar=tars[row])

    def stream(self, split: str | None = None) -> Iterator[dict]:
        """Every sample as webdataset gives it: {"__key__": KEY, "jpg": bytes, "txt": …, "json": …}.

        A tar with fewer or more samples than its index says is an error.
        """
        for name in self.names(split):
            count = 0
            for sample in stream(self.tar(name)):
                count += 1
                yield sample
            if count != self.entries[name]["samples"]:
                raise InputError(
                    f"{self.tar(name)} holds {count} samples, its index says "
                    f"{self.entries[name]['samples']}; delete it and run `halftone shard` again"
                )

    @functools.cached_property
    def _rows(self) -> tuple[pa.Table, dict[str, int], list[str]]:
        """All samples, the row of every image and the tar of every row."""
        tables = {name: self.table(name, COLUMNS) for name in self.entries}
        table = parquet.joined(tables.values())
        rows = {image_id: row for row, image_id in enumerate(table["image_id"].to_pylist())}
        return table, rows, [self.tar(name) for name, t in tables.items() for _ in range(len(t))]

    def _uri(self, name: str, suffix: str) -> str:
        if name not in self.entries:
            hint = did_you_mean(name, self.entries)
            raise InputError(f"no shard {name!r} in {self.folder}{hint}")
        return store.join(self.folder, f"{name}.{suffix}")


def stream(tar: str) -> Iterator[dict]:
    """Every sample of one tar, in order, as webdataset gives it; bytes are not decoded."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with store.file_system_of(tar) as (fs, path):
        file = fs.open(path, "rb")
    with file:
        try:
            yield from group_by_keys(tar_file_expander([{"url": tar, "stream": file}]))
        except tarfile.TarError as error:
            do = "delete it and run `halftone shard` again"
            raise InputError(f"{tar} is torn ({error}); {do}") from error
