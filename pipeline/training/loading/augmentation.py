"""Random views of training images, the same ones wherever and whenever a pair is drawn."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance

from pipeline.errors import InputError
from pipeline.models.preprocessing import INTERPOLATIONS, Preprocessing
from pipeline.sharding.images import open_picture

if TYPE_CHECKING:
    from schemas.settings import TrainSettings

ASPECTS = (3 / 4, 4 / 3)  # of a crop's sides
TRIES = 10  # to fit a crop into the image
COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Augment:
    """Random crop, mirror and colours, as `train` sets them."""

    crop: float  # smallest share of the image's area that is kept
    flip: bool
    colour: float  # each of brightness, contrast and saturation × 1 ± this

    @classmethod
    def of(cls, settings: "TrainSettings") -> "Augment | None":
        """None where images are shown as they are."""
        found = cls(settings.crop, settings.flip, settings.colour)
        return None if found == cls(1.0, False, 0.0) else found

    def __call__(self, data: bytes, how: Preprocessing, draw: list[int]) -> np.ndarray:
        """The view (3, H, W) uint8 of an image that the numbers `draw` stand for."""
        if data.startswith(b"\x93NUMPY"):
            raise InputError(
                "train.crop, train.flip and train.colour need image shards; these hold features"
            )
        rng = np.random.default_rng(draw)
        image = self._cropped(rng, open_picture(data), how)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            for enhance in COLOURS:
                image = enhance(image).enhance(rng.uniform(1 - self.colour, 1 + self.colour))
        return np.asarray(image).transpose(2, 0, 1)

    def _cropped(self, rng, image: Image.Image, how: Preprocessing) -> Image.Image:
        """A random crop at the tower's size; without one what evaluation sees."""
        width, height = image.size
        left, top, right, bottom = self._box(rng, width, height)
        if (right - left, bottom - top) == image.size and not how.shrink:
            return how.picture(image.convert("RGB"))
        # Decoded at the next larger eighth at which the crop still has the size of its picture.
        tall, wide = how.shape
        scale = max(tall, wide) / min(right - left, bottom - top)
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        image = image.convert("RGB")
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, right * x, bottom * y)
        return image.resize((wide, tall), INTERPOLATIONS[how.interpolation], box=box)

    def _box(self, rng, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a crop inside the image, the whole of it if none fits."""
        for _ in range(TRIES if self.crop < 1 else 0):
            area = width * height * rng.uniform(self.crop, 1)
            aspect = math.exp(rng.uniform(*map(math.log, ASPECTS)))
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height
