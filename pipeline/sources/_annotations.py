"""Reading annotation files, with errors that say where they are wrong."""

import fsspec

from pipeline import _store
from pipeline._errors import InputError
from schemas.settings import SourceSettings

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def path(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`; `expected` says in the error what it should be."""
    if not settings.path:
        raise InputError(f"source.path is not given; the {settings.kind} source reads {expected}")
    return _store.absolute(settings.path)


def file(settings: SourceSettings, expected: str) -> str:
    """The absolute `source.path`, which is an existing file."""
    uri = path(settings, expected)
    if _is_folder(uri):
        raise InputError(f"source.path {uri} is a folder; expected {expected}")
    if not _store.exists(uri):
        raise InputError(f"source.path {uri} does not exist; expected {expected}")
    return uri


def image_folder(settings: SourceSettings) -> str:
    """The absolute `source.images`, which is an existing folder."""
    if not settings.images:
        raise InputError(
            f"source.images is not given; the {settings.kind} source needs the image files' folder"
        )
    uri = _store.absolute(settings.images)
    if not _is_folder(uri):
        found = "is not a folder" if _store.exists(uri) else "does not exist"
        raise InputError(f"source.images {uri} {found}; expected the folder of the image files")
    return uri


def _is_folder(uri: str) -> bool:
    fs, path = fsspec.core.url_to_fs(uri)
    return fs.isdir(path)


def lines(uri: str) -> list[str]:
    """The lines of a UTF-8 file without their ends; of a wrong byte, the error names the line."""
    data = _store.read_bytes(uri).removeprefix(b"\xef\xbb\xbf")
    rows = data.split(b"\n")
    if not rows[-1]:
        rows.pop()
    return [_decoded(uri, number, row) for number, row in enumerate(rows, 1)]


def _decoded(uri: str, number: int, row: bytes) -> str:
    try:
        return row.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{uri} line {number} is not UTF-8 (byte 0x{row[error.start]:02x} at column "
            f"{error.start + 1}); save the file as UTF-8"
        ) from None


def stem(name: str) -> str:
    """A file's name without folders and without the ending of an image type."""
    name = _store.name_of(name)
    ending = next((e for e in IMAGE_TYPES if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


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
