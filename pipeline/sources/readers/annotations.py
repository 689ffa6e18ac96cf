"""Reading annotation files, with errors that say where they are wrong."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from braceexpand import braceexpand

from pipeline.errors import InputError
from pipeline.storage import store
from schemas.settings import SourceSettings

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
CAPTION_KEYS = ("raw", "caption", "captions", "text", "sentence")  # of a caption that is a record


def path(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`; `expected` says in the error what it should be."""
    if not settings.path:
        raise InputError(f"source.path is not given; the {settings.kind} source reads {expected}")
    return store.absolute(settings.path)


def file(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`, which is an existing file."""
    uri = path(settings, expected)
    if is_folder(uri):
        raise InputError(f"source.path {uri} is a folder; expected {expected}")
    if not store.exists(uri):
        raise InputError(f"source.path {uri} does not exist; expected {expected}")
    return uri


def files(settings: SourceSettings, expected: str) -> list[str]:
    """The files `source.path` names: one, or all of a pattern (`data/*.csv`, `{000..099}.tar`)."""
    uri = path(settings, expected)
    if not any(sign in uri for sign in "*?[{}") or store.exists(uri):
        return [file(settings, expected)]
    try:
        patterns = list(braceexpand(uri))
    except ValueError:
        raise InputError(
            f"source.path {uri} has a brace without its other half; write {{000..099}} for "
            f"numbered names, and a backslash before a brace of a name; expected {expected}"
        ) from None
    found = [name for pattern in patterns for name in _matches(pattern)]
    if not found:
        raise InputError(f"no file matches source.path {uri}; expected {expected}")
    return found


def _matches(pattern: str) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    with store.file_system_of(pattern) as (fs, path):
        found = sorted(fs.glob(path))
    return found if store.is_local(pattern) else [fs.unstrip_protocol(name) for name in found]


def stamps(uris: Iterable[str]) -> list[list]:
    """[URI, size, modification time] of files, to notice that one was changed."""
    out = []
    for uri in uris:
        try:
            out.append([uri, *store.stamp(uri)])
        except FileNotFoundError:
            raise InputError(f"{uri} does not exist; mend source.path") from None
    return out


def stamp_of_part(settings: SourceSettings, part: str) -> list:
    """What the rows of a part that is one file depend on: that file's stamp."""
    return stamps([part])


def image_folder(settings: SourceSettings) -> str:
    """The absolute `source.images`, which is an existing folder."""
    if not settings.images:
        raise InputError(
            f"source.images is not given; the {settings.kind} source needs the image files' folder"
        )
    uri = store.absolute(settings.images)
    if not is_folder(uri):
        found = "is not a folder" if store.exists(uri) else "does not exist"
        raise InputError(f"source.images {uri} {found}; expected the folder of the image files")
    return uri


def is_folder(uri: str) -> bool:
    with store.file_system_of(uri) as (fs, path):
        return fs.isdir(path)


def opened(uri: str) -> BinaryIO:
    """The file opened for reading, from wherever it is."""
    with store.file_system_of(uri) as (fs, path):
        return fs.open(path, "rb")


def lines(uri: str) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; of a wrong byte, the error names the line."""
    with opened(uri) as file:
        for number, row in enumerate(file, 1):
            yield _decoded(uri, number, row if number > 1 else row.removeprefix(b"\xef\xbb\xbf"))


def _decoded(uri: str, number: int, row: bytes) -> str:
    try:
        return row.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{uri} line {number} is not UTF-8 (byte 0x{row[error.start]:02x} at column "
            f"{error.start + 1}); save the file as UTF-8"
        ) from None


def read_json(uri: str, expected: str) -> dict:
    """The object of a JSON file; of what is not JSON, the error names the line."""
    try:
        content = json.loads("\n".join(lines(uri)))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{uri} is not valid JSON (line {error.lineno}: {error.msg}); expected {expected}"
        ) from None
    return content if isinstance(content, dict) else {}


def field(entry: dict, key: str, type_: type, where: str, expected: str):
    """The entry's value of that type; the error says where there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, type_) or isinstance(value, bool):
        kind = {str: "text", list: "list", int: "number"}[type_]
        raise InputError(f"{where} has no {kind} {key!r}; expected {expected}")
    return value


def image_path(cell, column: str, where: str) -> str:
    """The path in a cell of a table, or the error that there is none."""
    if not cell or not isinstance(cell, str):
        raise InputError(f"{where} has no path in {column!r}; fill or drop it")
    return cell


def image_uri(folder: str, path: str) -> str:
    """An image's path inside the folder, or the path itself where it is absolute or a URI."""
    return path if path.startswith("/") or "://" in path else store.join(folder, path)


def stem(name: str) -> str:
    """A path without the ending of an image type."""
    ending = next((e for e in IMAGE_TYPES if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def image_ids(paths: Iterable[str]) -> dict[str, str]:
    """What each image is called: its path, without the ending unless two differ in that alone."""
    stems = {path: stem(path) for path in paths}
    times = Counter(stems.values())
    return {
        path: stem if times[stem] == 1 and (stem == path or stem not in stems) else path
        for path, stem in stems.items()
    }


def split_of(uri: str) -> str | None:
    """The split a file is named after (captions_val2017.json: val), None without such a word."""
    words = re.split(r"[^a-z]+", store.name_of(uri).lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def texts(cell) -> list[str]:
    """The captions in a value: a text, a list of them, or records with the text under a name."""
    if isinstance(cell, list | tuple):
        return [text for part in cell for text in texts(part)]
    if isinstance(cell, dict):
        key = next((key for key in CAPTION_KEYS if key in cell), None)
        if key is None:
            raise InputError(
                f"a caption is a record of {sorted(cell)}; expected a text under one of the names "
                f"{', '.join(CAPTION_KEYS)}"
            )
        return texts(cell[key])
    return ["" if cell is None else str(cell)]


def row(image_id: str, uri: str, split: str, captions: list[tuple[str, str]], source: str) -> dict:
    """A manifest row of an image of which only the file itself could tell the size."""
    return {
        "image_id": image_id,
        "uri": uri,
        "split": split,
        "captions": [{"caption_id": id_, "text": text} for id_, text in captions],
        "width": None,
        "height": None,
        "sha256": None,
        "source": source,
    }
