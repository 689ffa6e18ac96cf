"""A picture as people and programs have it becomes a file's bytes, which `checked` takes on."""

import base64
import binascii
import io
import re
import urllib.parse
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import InputError
from pipeline.sharding.images import ORIENTATION, Rejected
from pipeline.storage import store

Picture = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray
DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+(?:=[^;,]*)?)*)(;base64)?,", re.I)
WEB = re.compile(r"https?://", re.I)
PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


def bytes_of(picture: Picture) -> bytes:
    """The bytes of an image file, or of a .npy file of region features; `Rejected` with the reason.

    A picture is a file's bytes, its path or URI, a data URI, a PIL image, or an array: (H, W, 3 or
    4) of uint8 is a picture, any other are features. Web addresses are not fetched.
    """
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | Path):
        return _of_address(str(picture))
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3 and picture.shape[2] in (3, 4) and picture.dtype == np.uint8:
            return _of_image(Image.fromarray(picture))
        if picture.dtype.kind not in "fiu":
            raise Rejected(f"not features: an array of {picture.dtype}")
        buffer = io.BytesIO()
        np.save(buffer, picture)
        return buffer.getvalue()
    if isinstance(picture, Image.Image):
        return _of_image(picture)
    raise Rejected(f"not a picture: {type(picture).__name__}")


def base64_bytes(text: str) -> bytes:
    """The bytes that are written in base64, blanks left out; `Rejected` where it is torn."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # of a letter that is no ASCII
        raise Rejected(f"base64 does not decode: {error}") from error


def _of_address(uri: str) -> bytes:
    if found := DATA_URI.match(uri):
        data = uri[found.end() :]
        if ";base64" in found[0].lower():
            return base64_bytes(urllib.parse.unquote(data))
        return urllib.parse.unquote_to_bytes(data)
    if uri.lower().startswith("data:"):
        raise Rejected(f"data URI is torn: begins with {uri[:32]!r}")
    if WEB.match(uri):
        raise Rejected(f"web address: {uri[:80]} is not fetched; give the picture's bytes")
    try:
        return store.read_bytes(store.absolute(uri))
    except (OSError, ValueError, InputError) as error:  # ValueError: a NUL in a path
        raise Rejected(f"file does not open: {uri[:80]!r} ({error})") from error


def _of_image(image: Image.Image) -> bytes:
    """A PIL image's file, where it was opened and not read yet; otherwise its pixels as PNG."""
    file = getattr(image, "fp", None)
    single = image.format == "MPO" or not getattr(image, "is_animated", False)
    if file is not None and getattr(image, "tile", None) and single:
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
        return data
    if image.mode in ("I", "F"):
        raise Rejected(f"numbers of unknown range: an image of mode {image.mode}")
    upright = Image.Exif()
    upright[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if image.mode in ("RGBa", "La", "PA") else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=upright)
    return buffer.getvalue()
