"""A folder of images, each with its captions beside it: `dogs/1.jpg` and `dogs/1.txt`.

A text file holds a caption a line, and is called as its image is, with `source.caption_ending` in
the place of the image's ending or behind it; an image without one is kept without captions. Folders
inside are read too, links are followed. Each folder directly inside `source.path` is a part; one
that is called train, val or test, at any depth, is that split.
"""

import os
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources import notes, splits
from pipeline.sources.part import Part
from pipeline.sources.readers import annotations, pictures
from pipeline.sources.readers.cells import Caption
from pipeline.storage import store, text_files
from schemas.settings import SourceSettings

EXPECTED = "a folder of images with their captions in .txt files beside them"
SETTINGS = {"caption_ending"}
NAMED = False  # a part is any folder of pictures: an image's own folders say its split


def parts(settings: SourceSettings) -> list[str]:
    """The folder itself, for the files directly in it, and each folder in it."""
    uri = annotations.path(settings, EXPECTED)
    if not annotations.is_folder(uri):
        found = "is a file" if store.exists(uri) else "does not exist"
        raise InputError(f"source.path {uri} {found}; expected {EXPECTED}")
    inside = (name for name in store.list_folders(uri) if not store.is_hidden(name))
    return [uri, *(store.join(uri, name) for name in inside)]


def inputs(settings: SourceSettings, part: str) -> list:
    """Hash of the files' names, and of the stamps of those that hold captions."""
    ending = settings.caption_ending.lower()
    found = _files(settings, part)
    return [
        store.fingerprint([[n, *([s] if n.lower().endswith(ending) else [])] for n, s in found])
    ]


def rows(settings: SourceSettings, part: Part) -> Iterator[dict]:
    """Manifest rows sorted by path; an image is called after its path inside `source.path`."""
    root = annotations.path(settings, EXPECTED)
    names = [name for name, _ in _files(settings, part.uri)]
    images = [name for name in names if pictures.is_picture(name)]
    ending = settings.caption_ending
    texts = {name: name for name in names if name.lower().endswith(ending.lower())}
    texts = {name.lower(): name for name in reversed(texts)} | texts  # IMG_1.TXT, where it is alone
    used = set()
    for name, image_id in pictures.image_ids(images).items():
        beside = [f"{name}{ending}" for name in (pictures.stem(name), name)]
        beside += [name.lower() for name in beside]
        text = next((texts[name] for name in beside if name in texts), None)
        used.add(text)
        lines = text_files.stream(store.join(root, text), EXPECTED) if text else iter(())
        captions = [Caption(None, line) for line in lines if line.strip()]
        folders = reversed(name.split("/")[:-1])
        named = next(filter(None, map(splits.of_folder, folders)), None)
        yield annotations.row(image_id, store.join(root, name), captions, named=named)
    for name in names:
        if name in texts.values() and name not in used:
            notes.add("captions beside no image", name)
        elif name not in texts.values() and not pictures.is_picture(name):
            notes.add("files that are no images", name)


def _files(settings: SourceSettings, part: str) -> Iterator[tuple[str, str]]:
    """Names inside `source.path` and stamps of a part's files, in order."""
    root = annotations.path(settings, EXPECTED).rstrip("/")
    folders = [part.rstrip("/")]
    while folders:
        folder = folders.pop()
        _check_loop(folder, root)
        for name, stamp in sorted(store.list_stamps(folder).items()):
            if not store.is_hidden(name):
                yield store.join(folder, name)[len(root) + 1 :], stamp
        if part.rstrip("/") != root:
            inside = [name for name in store.list_folders(folder) if not store.is_hidden(name)]
            folders += [store.join(folder, name) for name in reversed(inside)]


def _check_loop(folder: str, root: str) -> None:
    """Refuses a link that leads back to a folder it lies in."""
    if not store.is_local(folder) or not os.path.islink(folder):
        return
    leads, above = os.path.realpath(folder), os.path.dirname(folder)
    while len(above) >= len(root):
        if os.path.realpath(above) == leads:
            raise InputError(
                f"{folder} is a link back to {above}, in which it lies itself; remove the link, or "
                "give another source.path"
            )
        above = os.path.dirname(above)
