"""Where the image files that annotations name lie, and what tells that one of them was changed."""

import functools
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from pipeline.errors import InputError, Unreachable
from pipeline.sources.readers import fetch
from pipeline.storage import store

TYPES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".jpf"),
)  # what `sharding.images` decodes
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_picture(name: str) -> bool:
    return name.lower().endswith(TYPES)


def stem(name: str) -> str:
    """A path without the ending of an image type."""
    ending = next((e for e in TYPES if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def image_ids(paths: Iterable[str]) -> dict[str, str]:
    """What each image is called: its path, without the ending unless two differ in that alone."""
    stems = {path: unicodedata.normalize("NFC", stem(path)) for path in paths}
    times = Counter(stems.values())
    return {
        path: stem if times[stem] == 1 and (stem == path or stem not in stems) else path
        for path, stem in stems.items()
    }


class Folder:
    """The folder that paths in annotations are relative to."""

    def __init__(self, uri: str):
        self.uri = uri

    def path(self, written: str) -> str:
        """A path as annotations write it, in one form: no ./ and no separators of Windows.

        Two ways to write one file are one path. An address, and a path from the root, stay whole.
        """
        path = written.strip()
        if path != written and not self._is_here(path) and self._is_here(written):
            return written  # blanks that are its own
        if fetch.is_address(path) or "://" in path:
            return path
        if "\\" in path and not self._is_here(path):
            path = path.replace("\\", "/")
        return posixpath.normpath(path)

    def _is_here(self, path: str) -> bool:
        uri = self.place(path)
        return store.is_local(uri) and os.path.exists(uri)

    def place(self, path: str) -> str:
        """The URI of a path inside the folder, or the path itself where it is a whole one."""
        if path.startswith("/") or "://" in path or DRIVE.match(path):
            return path
        return store.join(self.uri, path)

    def find(self, path: str) -> str:
        """The URI of a file; of one that lies there in another Unicode form, that one's."""
        uri = self.place(path)
        if path.isascii() or not store.is_local(uri) or os.path.exists(uri):
            return uri
        near, same = alike(uri)
        return near if near and same else uri


def alike(uri: str) -> tuple[str | None, bool]:
    """The file in the same folder with the same name but for case or Unicode form, if there is one.

    With it, whether only the form differs: then it is the same name.
    """
    folder, _, name = uri.rpartition("/")
    known, wanted = _names(folder), _plain(name)
    found = known.get(wanted)
    if found is None or found == name:
        return None, False
    same = unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", name)
    return store.join(folder, found), same


@functools.lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, str]:
    return {_plain(name): name for name in store.list_files(folder)}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Stamps:
    """What tells that files were changed: their sizes and times, or an object store's tags.

    Folders of a store are listed, not asked file by file.
    """

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, str]] = {}

    def of(self, uris: tuple[str, ...]) -> str | None:
        """The stamp of the files that a row's bytes lie in; None where one of them is not there."""
        stamps = [self._of(uri) for uri in uris]
        return "+".join(filter(None, stamps)) if stamps and None not in stamps else None

    def _of(self, uri: str) -> str | None:
        if fetch.is_address(uri):
            return None
        if store.is_local(uri):
            try:
                info = os.stat(uri.removeprefix("file://"))
            except (OSError, ValueError):  # not there; no path at all
                return None
            return f"{info.st_size}-{info.st_mtime_ns}"
        folder, _, name = uri.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        return self._listed[folder].get(name)

    def _list(self, folder: str) -> dict[str, str]:
        try:
            return store.list_stamps(folder)
        except Unreachable:
            raise
        except InputError:  # nobody may look there: reading the files will tell why
            return {}
