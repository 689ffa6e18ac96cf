"""Thumbnails and captions of a split's samples, for pages and terminals."""

import base64
import io

from PIL import Image

from pipeline.reading import Shards

SIDE = 128  # pixels of a thumbnail's longer side
QUALITY = 80


class Pictures:
    """The samples of a split by image id; a picture's bytes are read when they are asked for."""

    def __init__(self, root: str, split: str):
        self.samples = {sample.image_id: sample for sample in Shards(root).samples(split)}
        self.captions = {
            caption["caption_id"]: caption["text"]
            for sample in self.samples.values()
            for caption in sample.captions
        }

    def caption_texts(self, image_id: str) -> list[str]:
        return [caption["text"] for caption in self.samples[image_id].captions]

    def thumbnail(self, image_id: str) -> str | None:
        """A small JPEG as a data URI; None where the shards hold features."""
        sample = self.samples[image_id]
        if sample.member.endswith(".npy"):
            return None
        image = sample.load().convert("RGB")
        image.thumbnail((SIDE, SIDE))
        return data_uri(image)


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
