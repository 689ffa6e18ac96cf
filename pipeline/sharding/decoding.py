"""An image's bytes become pixels or features."""

import io
import json
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.sharding.images import open_picture


class Pixels(Protocol):
    """What makes an image tower's pixels of a picture (`pipeline.models.preprocessing`)."""

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8."""


def decode(data: bytes, how: Pixels) -> np.ndarray:
    """A feature array as it was stored, or an image as (3, H, W) uint8, made so."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data))
    return how.pixels(open_picture(data))


def put(image: np.ndarray, out: np.ndarray) -> None:
    """Write a decoded image, or features, where it is to lie: channels one after another."""
    if image.ndim != 3:
        out[:] = image
        return
    for channel, plane in zip(image, out, strict=True):  # each is read with one stride
        plane[:] = channel


def stream(tar: str, how: Pixels) -> Iterator[tuple[dict, np.ndarray]]:
    """Every sample of a shard in order: its JSON member and its decoded image or features."""
    from pipeline.sharding import reading  # Arrow comes with it, and decoding needs none

    for sample in reading.stream(tar):
        payload = next(sample[suffix] for suffix in ("jpg", "png", "npy") if suffix in sample)
        yield json.loads(sample["json"]), decode(payload, how)
