"""Flickr's token file, a caption a line: `NAME.jpg#0<TAB>A dog runs .`

Splits come from the lists `Flickr_8k.trainImages.txt`, `.devImages.txt` and `.testImages.txt`
beside the token file; an image on none of them is left out. Without any list, all are train.
"""

import re
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources import notes
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, pictures
from pipeline.sources.readers.cells import Caption
from pipeline.sources.readers.pictures import Folder
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a Flickr token file (Flickr8k.token.txt)"
SETTINGS = {"images"}
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


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows in the order in which the images first appear."""
    folder = Folder(annotations.image_folder(settings))
    splits = _splits(part.uri)
    captions = _captions(part.uri)
    for name, image_id in pictures.image_ids(captions).items():
        if splits and name not in splits:
            notes.add("images on no list of a split", name)
            continue
        texts = [Caption(f"{image_id}#{number}", text) for number, text in captions[name]]
        yield annotations.row(image_id, folder.find(name), texts, split=splits.get(name))


def _splits(uri: str) -> dict[str, str]:
    """The split of each image on the lists beside the token file."""
    out: dict[str, str] = {}
    for split, list_uri in _lists(uri).items():
        for line in text_files.stream(list_uri, "a list of images"):
            if (name := line.strip()) and out.setdefault(name, split) != split:
                on = f"which is on the list of {out[name]} too"
                raise InputError(f"{list_uri} lists {name!r}, {on}; leave it on one")
    return out


def _lists(uri: str) -> dict[str, str]:
    folder = uri.rsplit("/", 1)[0]
    there = store.list_files(folder)
    return {split: store.join(folder, name) for split, name in LISTS.items() if name in there}


def _captions(uri: str) -> dict[str, list[tuple[str, str]]]:
    """Captions with their numbers, by image file name."""
    captions: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(text_files.stream(uri, EXPECTED), 1):
        if not line.strip():
            continue
        if not (match := LINE.fullmatch(line)):
            found = f"{uri} line {number} is {line[:60]!r}"
            raise InputError(f"{found}; expected NAME.jpg#0<TAB>caption")
        captions.setdefault(match["name"], []).append((match["number"], match["text"]))
    return captions
