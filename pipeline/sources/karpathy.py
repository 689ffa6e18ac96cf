"""Karpathy's JSON of Flickr8k, Flickr30k and COCO: images with a split and their sentences.

    {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}]}]}

`filepath` (COCO's folder inside the image folder) and `sentid` are used where they are there.
COCO's "restval" is train.
"""

import json
from collections.abc import Iterator

from pipeline import _store
from pipeline._errors import InputError
from pipeline.sources import _annotations
from schemas.settings import SourceSettings

EXPECTED = "a Karpathy JSON file (dataset_flickr8k.json)"


def parts(settings: SourceSettings) -> list[str]:
    """One part: the file is read as a whole."""
    return [_store.name_of(inputs(settings)[0])]


def inputs(settings: SourceSettings) -> list[str]:
    """The JSON file."""
    return [_annotations.file(settings, EXPECTED)]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows in the order of the file."""
    uri = inputs(settings)[0]
    folder = _annotations.image_folder(settings)
    images = _read(uri)
    for number, image in enumerate(images):
        where = f"{uri} image {number}"
        filename, split = _text(image, "filename", where), _text(image, "split", where)
        names = [image["filepath"]] if image.get("filepath") else []
        image_id = _annotations.stem(filename)
        yield _annotations.row(
            image_id,
            _store.join(folder, *names, filename),
            "train" if split == "restval" else split,
            list(_captions(image, image_id, where)),
            "karpathy",
        )


def _read(uri: str) -> list[dict]:
    try:
        content = json.loads("\n".join(_annotations.lines(uri)))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{uri} is not valid JSON (line {error.lineno}: {error.msg}); expected {EXPECTED}"
        ) from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise InputError(f"{uri} has no list 'images'; expected {EXPECTED}")
    return images


def _captions(image: dict, image_id: str, where: str) -> Iterator[tuple[str, str]]:
    sentences = image.get("sentences")
    if not isinstance(sentences, list):
        raise InputError(f"{where} has no list 'sentences'; expected {EXPECTED}")
    for k, sentence in enumerate(sentences):
        text = _text(sentence, "raw", f"{where} sentence {k}")
        yield str(sentence.get("sentid", f"{image_id}#{k}")), text


def _text(entry: dict, key: str, where: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise InputError(f"{where} has no text {key!r}; expected {EXPECTED}")
    return value
