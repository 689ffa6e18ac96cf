"""A folder of images, each with its captions beside it: `dogs/1.jpg` and `dogs/1.txt`.

A text file holds a caption a line; an image without one is kept without captions. Folders inside
are read too, but not those that are links. Each folder directly inside `source.path` is a part; one
that is called train, val or test is a split, unless `source.split` says otherwise.
"""

import os
from collections.abc import Iterator

from pipeline.errors import InputError
from pipeline.sources.readers import annotations
from pipeline.storage import store
from schemas.settings import SourceSettings

EXPECTED = "a folder of images with their captions in .txt files beside them"


def parts(settings: SourceSettings) -> list[str]:
    """The folder itself, for the files directly in it, and each folder in it."""
    uri = annotations.path(settings, EXPECTED)
    if not annotations.is_folder(uri):
        found = "is a file" if store.exists(uri) else "does not exist"
        raise InputError(f"source.path {uri} {found}; expected {EXPECTED}")
    return [uri, *(store.join(uri, name) for name in _listing(uri)[0])]


def inputs(settings: SourceSettings, part: str) -> list:
    """Hash of the images' names and the text files' stamps."""
    found = [
        [name, *(stamp if name.endswith(".txt") else ())]
        for name, stamp in _files(settings, part)
        if name.endswith(".txt") or _is_image(name)
    ]
    return [store.fingerprint(found)]


def rows(settings: SourceSettings, part: str) -> Iterator[dict]:
    """Manifest rows sorted by path; an image is called after its path inside `source.path`."""
    root = annotations.path(settings, EXPECTED)
    names = [name for name, _ in _files(settings, part)]
    texts = {name for name in names if name.endswith(".txt")}
    folder = store.name_of(part) if part != root else ""
    split = settings.split or annotations.SPLIT_WORDS.get(folder.lower(), "train")
    images = [name for name in names if _is_image(name)]
    for name, image_id in annotations.image_ids(images).items():
        text = annotations.stem(name) + ".txt"
        lines = annotations.lines(store.join(root, text)) if text in texts else iter(())
        captions = [(f"{image_id}#{k}", line) for k, line in enumerate(filter(str.strip, lines))]
        yield annotations.row(image_id, store.join(root, name), split, captions, "folder")


def _is_image(name: str) -> bool:
    return name.lower().endswith(annotations.IMAGE_TYPES)


def _files(settings: SourceSettings, part: str) -> Iterator[tuple[str, list]]:
    """Names inside `source.path` and stamps of a part's files, in order."""
    root = annotations.path(settings, EXPECTED).rstrip("/")
    folders = [part.rstrip("/")]
    while folders:
        folder = folders.pop()
        inside, files = _listing(folder)
        for name in sorted(files):
            yield store.join(folder, name)[len(root) + 1 :], files[name]
        if part.rstrip("/") != root:
            folders += [store.join(folder, name) for name in reversed(inside)]


def _listing(folder: str) -> tuple[list[str], dict[str, list]]:
    """Names of the folders in a folder, links left out, and the stamps of its files."""
    if store.is_local(folder):
        with os.scandir(folder) as found:
            here = list(found)
        folders = [e.name for e in here if e.is_dir(follow_symlinks=False)]
        stats = {e.name: e.stat(follow_symlinks=False) for e in here if not e.is_dir()}
        return sorted(folders), {n: [stat.st_size, stat.st_mtime] for n, stat in stats.items()}
    with store.file_system_of(folder) as (fs, path):
        entries = [e for e in fs.ls(path, detail=True) if e["name"].strip("/") != path.strip("/")]
    folders = [store.name_of(e["name"]) for e in entries if e["type"] == "directory"]
    files: dict[str, list] = {}
    for entry in (e for e in entries if e["type"] == "file"):
        changed = (entry[key] for key in ("ETag", "LastModified", "created") if key in entry)
        files[store.name_of(entry["name"])] = [entry["size"], str(next(changed, ""))]
    return sorted(folders), files
