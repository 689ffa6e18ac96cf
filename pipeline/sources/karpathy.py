"""Karpathy's JSON of Flickr8k, Flickr30k and COCO: images with a split and their sentences.

    {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}]}]}

`filepath` (COCO's folder inside the image folder) and `sentid` are used where they are there.
COCO's "restval" is train.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, cells, pictures
from pipeline.sources.readers.cells import Caption
from pipeline.sources.readers.pictures import Folder
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a Karpathy JSON file (dataset_flickr8k.json)"
SETTINGS = {"images"}
inputs = annotations.stamp_of_part


def parts(settings: SourceSettings) -> list[str]:
    """One part: the file is read as a whole."""
    return [annotations.file(settings, EXPECTED)]


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows in the order of the file."""
    folder = Folder(annotations.image_folder(settings))
    images = annotations.field(
        text_files.loosely_parsed(part.uri, EXPECTED), "images", list, part.uri
    )
    names = [
        cells.place(image.get("filename")) if isinstance(image, dict) else None for image in images
    ]
    ids = pictures.image_ids(folder.path(name) for name in names if name)
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        where = f"{part.uri} image {number}"
        if not name:
            problem = f"no file name: {where} has no text 'filename'"
            yield annotations.row(f"image-{number}", f"{part.uri}#{number}", [], problem=problem)
            continue
        inside = cells.place(image.get("filepath"))
        path = folder.path(store.join(inside, name) if inside else name)
        captions = list(_captions(image.get("sentences"), where))
        split = cells.identifier(image.get("split"))
        yield annotations.row(ids[folder.path(name)], folder.find(path), captions, split=split)


def _captions(sentences: Any, where: str) -> Iterator[Caption]:
    if not isinstance(sentences, list):
        yield Caption(None, "", f"no caption: {where} has no list 'sentences'")
        return
    for sentence in sentences:
        record = sentence if isinstance(sentence, dict) else {"raw": sentence}
        found = cells.captions({**record, "raw": record.get("raw")})
        yield found[0] if found else Caption(None, "", f"no caption: {where} has a null sentence")
