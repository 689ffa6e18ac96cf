"""Flickr's token file, a caption a line: `NAME.jpg#0<TAB>A dog runs .`

Splits come from the lists `Flickr_8k.trainImages.txt`, `.devImages.txt` and `.testImages.txt`
beside the token file; an image on none of them is left out. Without any list, all are train.
"""

import re
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a Flickr token file (Flickr8k.token.txt)"
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
# Flickr8k names one image NAME.jpg.1; its file is NAME.jpg.
LINE = re.compile(r"(?P<name>[^\t]+?)(\.\d+)?#(?P<number>\d+)\t(?P<text>.*)")


def parts(settings: SourceSettings) -> list[str]:
    """One part: the file is read as a whole."""
    return [annotations.file(settings, EXPECTED)]


def inputs(settings: SourceSettings, part: str) -> list:
    """The stamps of the token file and the split lists beside it."""
    return annotations.stamps([part, *_lists(part).values()])


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows in the order in which the images first appear."""
    folder = annotations.image_folder(settings)
    lists = _lists(part)
    lines = ((split, name) for split, uri in lists.items() for name in annotations.lines(uri))
    splits = {name.strip(): split for split, name in lines}
    captions = _captions(part)
    for name, image_id in annotations.image_ids(captions).items():
        if split := splits.get(name) if lists else "train":
            texts = [(f"{image_id}#{number}", text) for number, text in captions[name]]
            uri = store.join(folder, name)
            yield annotations.row(image_id, uri, split, texts, "flickr_tokens")


def _lists(uri: str) -> dict[str, str]:
    folder = uri.rsplit("/", 1)[0]
    there = store.list_files(folder)
    return {split: store.join(folder, name) for split, name in LISTS.items() if name in there}


def _captions(uri: str) -> dict[str, list[tuple[str, str]]]:
    """Captions with their numbers, by image file name."""
    captions: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(annotations.lines(uri), 1):
        if not line.strip():
            continue
        if not (match := LINE.fullmatch(line)):
            found = f"{uri} line {number} is {line[:60]!r}"
            raise InputError(f"{found}; expected NAME.jpg#0<TAB>caption")
        captions.setdefault(match["name"], []).append((match["number"], match["text"]))
    return captions
