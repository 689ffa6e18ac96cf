"""Thumbnails and captions of a split's samples, for pages and terminals."""

import base64
import io

from PIL import Image

from pipeline import _plan, _store, shard

SIDE = 128  # pixels of a thumbnail's longer side
QUALITY = 80


class Pictures:
    """The samples of a split by image id; a picture's bytes are read when they are asked for."""

    def __init__(self, root: str, split: str):
        index = _plan.need_index(_plan.folder(root, "shard"), "shard")
        self.samples: dict[str, dict] = {}
        for entry in _plan.of_split(index, split):
            tar = _plan.folder(root, "shard", f"{entry['name']}.tar")
            columns = ["image_id", "captions", "member", "offset", "size"]
            sidecar = _plan.folder(root, "shard", f"{entry['name']}.parquet")
            for row in shard.read_sidecar(sidecar, columns).to_pylist():
                self.samples[row["image_id"]] = {**row, "tar": tar}
        self.captions = {
            caption["caption_id"]: caption["text"]
            for row in self.samples.values()
            for caption in row["captions"]
        }

    def caption_texts(self, image_id: str) -> list[str]:
        return [caption["text"] for caption in self.samples[image_id]["captions"]]

    def thumbnail(self, image_id: str) -> str | None:
        """A small JPEG as a data URI; None where the shards hold features."""
        row = self.samples[image_id]
        if row["member"].endswith(".npy"):
            return None
        image = Image.open(io.BytesIO(_store.read_bytes(row["tar"], row["offset"], row["size"])))
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        return data_uri(image)


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
