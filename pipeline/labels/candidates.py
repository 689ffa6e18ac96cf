"""The captions of a split as candidates, a shard at a time, and what people decided of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.labels import decisions
from pipeline.labels.caption_vectors import Captions
from pipeline.storage import cache, parquet
from pipeline.storage.run_folder import Files
from schemas.settings import LabelSettings

SMALL = 2**28  # bytes of a split's vectors that a process keeps


class Block(NamedTuple):
    """The captions of one shard; rows of a split are counted from its first shard on."""

    captions: Captions
    first_caption: int  # row in the split of the block's first caption
    first_image: int  # and of its first image


class Pairs(NamedTuple):
    """Decided pairs (P,) of an image and a caption, by their rows in the split, and by id."""

    image_P: np.ndarray
    caption_P: np.ndarray
    image_of_P: np.ndarray  # the row of the caption's own image
    value_P: np.ndarray
    ids: Sequence[tuple[str, str]]  # image, caption


_kept: dict[tuple[str, str], Captions] = {}  # a small split's shards, in this process


def is_small(captions: int, dim: int) -> bool:
    """Whether a process keeps the captions of a split for its next task."""
    return 4 * captions * dim <= SMALL


def blocks(files: Files, copies: dict[str, dict], limit: float, small: bool) -> Iterator[Block]:
    """All shards of a split in order, read one after the other.

    `copies` says of files in a remote store their {"bytes", "sha256"}: they are fetched once a
    node, within `limit` bytes, and read by all its tasks. A `small` split is read once a process.
    """
    captions = images = 0
    if not small or any(version != files.version for version, _ in _kept):
        _kept.clear()
    for name, uri in zip(files.names, files.uris, strict=True):
        if (block := _kept.get((files.version, name))) is None:
            here = cache.kept(uri, copies[name], limit) if name in copies else uri
            block = Captions(parquet.read_tables([here]))
        if small:
            _kept[files.version, name] = block
        yield Block(block, captions, images)
        captions, images = captions + len(block.caption_ids), images + len(block.image_ids)


class Decided:
    """The pairs people decided that are of a shard's images or captions, found block by block."""

    def __init__(self, mine: Captions, settings: LabelSettings):
        pairs = () if settings.overrides is None else decisions.overrides(settings.overrides)
        captions = set(mine.caption_ids) if pairs else set()
        self.mine = mine
        self.asked = [p for p in pairs if p.image_id in mine.image_row or p.caption_id in captions]
        self.image: dict[str, int] = {}  # rows in the split
        self.caption: dict[str, tuple[int, int]] = {}  # its own, and that of its image

    def see(self, block: Block) -> list[tuple[int, int, float]]:
        """Look for the pairs in a block; those of my images: image row, caption row, relevance."""
        if not self.asked:
            return []
        here, met = block.captions, []
        row = {caption_id: n for n, caption_id in enumerate(here.caption_ids)}
        for image_id, caption_id, value in self.asked:
            if image_id in here.image_row:
                self.image[image_id] = block.first_image + here.image_row[image_id]
            if caption_id in row:
                n = row[caption_id]
                of_image = block.first_image + int(here.image_of[n])
                self.caption[caption_id] = block.first_caption + n, of_image
                if image_id in self.mine.image_row:
                    met.append((self.mine.image_row[image_id], n, value))
        return met

    def pairs(self) -> Pairs:
        """Those whose image and caption are in the split, after all of it was seen."""
        known = [p for p in self.asked if p.image_id in self.image and p.caption_id in self.caption]
        rows = [(self.image[p.image_id], *self.caption[p.caption_id]) for p in known]
        table = np.array(rows, np.int64).reshape(-1, 3)
        values = np.array([p.relevance for p in known], np.float32)
        image_P, caption_P, of_image_P = table.T
        ids = [(p.image_id, p.caption_id) for p in known]
        return Pairs(image_P, caption_P, of_image_P, values, ids)

    def most(self, queries: str) -> int:
        """How many of a query's candidates may be decided at most; of images ("i") or texts."""
        ids = [p.image_id if queries == "i" else p.caption_id for p in self.asked]
        return max(map(ids.count, set(ids)), default=0)
