"""Thumbnails and captions of a split's samples, for pages and terminals."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.sharding.reading import COLUMNS, Sample, Shards
from pipeline.sharding.sidecar import accepted
from pipeline.storage import mapped, parquet, store
from pipeline.storage.mapped import LIMIT, Rows

KIND = "pictures-1"  # of what is made of a sidecar; another number, made in another way

SIDE = 128  # pixels of a thumbnail's longer side
QUALITY = 80


class Caption(NamedTuple):
    """A caption of a split."""

    id: str
    text: str
    image: int  # row of its image


class Pictures:
    """The samples of a split by row, in the shards' order, and by id.

    Captions and the places of pictures are mapped from this machine's cache (`storage.mapped`), a
    picture's bytes read when they are asked for. `limit` is what the cache may take (bytes).
    """

    def __init__(self, root: str, split: str, limit: float = LIMIT):
        self.shards, self.limit = Shards(root), limit
        entries = [self.shards.entries[name] for name in self.shards.names(split)]
        self.entries = [entry for entry in entries if entry["samples"]]
        self.images = Rows([entry["samples"] for entry in self.entries])
        self.captions = Rows([entry["captions"] for entry in self.entries])
        self._row: dict[str, int] = {}  # of the images that were looked for

    def table(self, shard: int) -> pa.Table:
        """The samples of a shard, in one chunk."""
        name = f"{self.entries[shard]['name']}.parquet"
        uri = store.join(self.shards.folder, name)
        return mapped.table(uri, self.entries[shard]["files"][name], self.limit, KIND, _of_shard)

    def samples(self, rows: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples in some rows."""
        out: dict[int, Sample] = {}
        for shard, places, of_shard in self.images.by_shard(np.asarray(rows, np.int64)):
            found = self.table(shard).take(pa.array(of_shard)).to_pylist()
            tar = self.shards.tar(self.entries[shard]["name"])
            out |= {p: Sample(**row, tar=tar) for p, row in zip(places, found, strict=True)}
        return [out[place] for place in range(len(out))]

    def heads(self, rows: Sequence[int] | np.ndarray) -> list[tuple[str, str]]:
        """Id and first caption of the images in some rows."""
        out: dict[int, tuple[str, str]] = {}
        for shard, places, of_shard in self.images.by_shard(np.asarray(rows, np.int64)):
            table = self.table(shard)
            lists, wanted = table["captions"].chunk(0), pa.array(of_shard)
            ids = table["image_id"].chunk(0).take(wanted).to_pylist()
            first = lists.offsets.take(wanted)
            texts = lists.values.field("text").take(first).to_pylist()
            out |= zip(places.tolist(), zip(ids, texts, strict=True), strict=True)
        return [out[place] for place in range(len(out))]

    def captions_at(self, rows: Sequence[int] | np.ndarray) -> list[Caption]:
        """The captions in some rows."""
        out: dict[int, Caption] = {}
        for shard, places, of_shard in self.captions.by_shard(np.asarray(rows, np.int64)):
            lists = self.table(shard)["captions"].chunk(0)
            images = np.searchsorted(lists.offsets.to_numpy(), of_shard, side="right") - 1
            found = lists.values.take(pa.array(of_shard)).to_pylist()
            first = int(self.images.starts[shard])
            for place, image, about in zip(places, images.tolist(), found, strict=True):
                out[place] = Caption(about["caption_id"], about["text"], first + image)
        return [out[place] for place in range(len(out))]

    def texts(self, ids: Iterable[str]) -> Iterator[str]:
        """The texts of captions that stand in the split's order, read a shard at a time."""
        text: dict[str, str] = {}
        shards = iter(range(len(self.entries)))
        for id_ in ids:
            while id_ not in text:
                captions = self.table(next(shards))["captions"].chunk(0).flatten().to_pylist()
                text = {about["caption_id"]: about["text"] for about in captions}
            yield text[id_]

    def row(self, image_id: str) -> int:
        """The row of an image; all ids are looked through the first time that it is asked for."""
        for shard in range(len(self.entries)) if image_id not in self._row else ():
            place = pc.index(self.table(shard)["image_id"], image_id).as_py()
            if place >= 0:
                self._row[image_id] = int(self.images.starts[shard]) + place
                break
        return self._row[image_id]

    def sample(self, image_id: str) -> Sample:
        """The sample of an image."""
        return self.samples([self.row(image_id)])[0]

    def caption_texts(self, image_id: str) -> list[str]:
        return [caption["text"] for caption in self.sample(image_id).captions]

    def thumbnail(self, image_id: str, side: int = SIDE, quality: int = QUALITY) -> str | None:
        """A small JPEG as a data URI; None where the shards hold features."""
        return thumbnail(self.sample(image_id), side, quality)


def _of_shard(data: bytes) -> pa.Table:
    table = accepted(parquet.of_bytes(data, [*COLUMNS, "reason"]))
    return table.cast(parquet.large(table.schema)).replace_schema_metadata()


def thumbnail(sample: Sample, side: int = SIDE, quality: int = QUALITY) -> str | None:
    """A small JPEG of a sample as a data URI; None where the shards hold features."""
    if sample.member.endswith(".npy"):
        return None
    return data_uri(small(sample.load(), side), quality)


def small(image, side: int) -> Image.Image:
    """The picture in RGB, its longer side at most so many pixels."""
    image.draft("RGB", (side, side))
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return image


def jpeg(image: Image.Image, quality: int = QUALITY) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def data_uri(image: Image.Image, quality: int = QUALITY) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image, quality)).decode()


def spaced(count: int, wanted: int) -> np.ndarray:
    """Evenly spaced rows of so many, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


@dataclass(frozen=True)
class Hit:
    """A result: an image with its first caption, or a caption with its image."""

    id: str
    image_id: str
    text: str
    score: float
    own: bool = False  # the query belongs to it
    relevance: float | None = None
    picture: str | None = None  # URI of a thumbnail
    row: int = -1  # of the image in its split
