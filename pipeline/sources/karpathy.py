"""Karpathy's JSON of Flickr8k, Flickr30k and COCO: images with a split and their sentences.

    {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}]}]}

`filepath` (COCO's folder inside the image folder) and `sentid` are used where they are there.
COCO's "restval" is train.
"""

import functools
from collections.abc import Iterator

from pipeline.sources.readers import annotations
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a Karpathy JSON file (dataset_flickr8k.json)"
inputs = annotations.stamp_of_part
_field = functools.partial(annotations.field, expected=EXPECTED)


def parts(settings: SourceSettings) -> list[str]:
    """One part: the file is read as a whole."""
    return [annotations.file(settings, EXPECTED)]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows in the order of the file."""
    folder = annotations.image_folder(settings)
    images = _field(annotations.read_json(part, EXPECTED), "images", list, part)
    names = [_field(im, "filename", str, f"{part} image {n}") for n, im in enumerate(images)]
    ids = annotations.image_ids(names)
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        where = f"{part} image {number}"
        split = _field(image, "split", str, where)
        inside = [image["filepath"]] if image.get("filepath") else []
        split = "train" if split == "restval" else split
        uri = store.join(folder, *inside, name)
        captions = list(_captions(image, ids[name], where))
        yield annotations.row(ids[name], uri, split, captions, "karpathy")


def _captions(image: dict, image_id: str, where: str) -> Iterator[tuple[str, str]]:
    for k, sentence in enumerate(_field(image, "sentences", list, where)):
        text = _field(sentence, "raw", str, f"{where} sentence {k}")
        yield str(sentence.get("sentid", f"{image_id}#{k}")), text
