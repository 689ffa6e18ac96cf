"""Thumbnails and captions of a split's samples, for pages and terminals."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.sharding.reading import Sample, Shards

SIDE = 128  # pixels of a thumbnail's longer side
QUALITY = 80


class Pictures:
    """The samples of a split by image id; a picture's bytes are read when they are asked for."""

    def __init__(self, root: str, split: str):
        self.samples = {sample.image_id: sample for sample in Shards(root).samples(split)}
        captions = (caption for sample in self.samples.values() for caption in sample.captions)
        self.captions = {caption["caption_id"]: caption["text"] for caption in captions}

    def caption_texts(self, image_id: str) -> list[str]:
        return [caption["text"] for caption in self.samples[image_id].captions]

    def thumbnail(self, image_id: str, side: int = SIDE, quality: int = QUALITY) -> str | None:
        """A small JPEG as a data URI; None where the shards hold features."""
        return thumbnail(self.samples[image_id], side, quality)


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
