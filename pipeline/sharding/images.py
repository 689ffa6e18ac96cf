"""Payloads of samples, checked to the last byte: pictures that every trainer reads, feature rows.

A picture keeps its bytes where nothing has to change: a JPEG or an opaque PNG in RGB or grey,
upright and of the size the policy asks for. Anything else becomes a JPEG: turned upright as EXIF
says, transparency laid on white, 16 bits scaled to 8.
"""

import io
import math
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

if TYPE_CHECKING:
    from schemas.settings import ShardSettings

# What people keep photos in; not those whose decoder runs other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # MPO: a JPEG with more after its end
ORIENTATION = 0x0112  # EXIF tag; its values and what makes them upright:
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}  # may hold an orientation
OPENING = threading.Lock()
# Texts and profiles in PNG files are unpacked to be skipped; over a megabyte is common.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class Rejected(Exception):
    """A sample that cannot be used; the message is its reason, 'kind: detail'."""


class Payload(NamedTuple):
    """What a sample brings into the tar."""

    data: bytes
    ending: str  # of the member's name: jpg, png, npy
    holds: str  # pictures, or features of one shape; a model reads one kind
    width: int | None = None  # pixels
    height: int | None = None


def checked(data: bytes, settings: "ShardSettings") -> Payload:
    """The payload for the tar, or `Rejected`."""
    if data.startswith(b"\x93NUMPY"):
        return _features(data)
    try:
        return _picture(data, settings)
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        raise Rejected(f"not an image: begins with {data[:16]!r}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
        raise Rejected(f"image does not decode: {error}") from error


def _picture(data: bytes, settings: "ShardSettings") -> Payload:
    image = open_picture(data)
    if image.width * image.height > settings.max_pixels:
        raise Rejected(f"too many pixels: {image.width} × {image.height}")
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise Rejected(f"animated: {image.format} of several frames")
    turn = UPRIGHT.get(_orientation(image))
    plain = image.format in ENDINGS and image.mode in ("RGB", "L")
    plain = plain and not image.has_transparency_data
    if turn is None and plain and _fits(image.size, settings):
        size = image.size
        if settings.decode_check:
            image.draft("L", (1, 1))
            image.load()  # `verify()` does not see a truncated file
        return Payload(data, ENDINGS[image.format], "pictures", *size)
    _draft(image, settings)
    image.load()
    image = _resized(upright(image), settings)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality, comment="")
    return Payload(buffer.getvalue(), "jpg", "pictures", *image.size)


def open_picture(data: bytes) -> Image.Image:
    """The picture, of which only the header was read; `shard.max_pixels` is its only limit."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow
    with OPENING:  # Pillow's own limit is a global
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def upright(image: Image.Image) -> Image.Image:
    """RGB, or L for grey, turned as EXIF says: what a picture is here, whatever its file's mode."""
    turn = UPRIGHT.get(_orientation(image))
    return _eight_bit(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    if not METADATA & image.info.keys():
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block of metadata turns nothing
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB, or L for grey; what is transparent becomes white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype("uint8"))
    if image.mode in ("I", "F"):
        raise Rejected(f"numbers of unknown range: {image.format} of mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "L":
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


# ---- size --------------------------------------------------------------------------------------


def _scale(size: tuple[int, int], settings: "ShardSettings") -> float:
    """By how much the policy scales; the two whose size is fixed enlarge, the others never do."""
    short, long = sorted(size)
    return {
        "keep": 1.0,
        "shorter": min(1.0, settings.size / short),
        "longer": min(1.0, settings.size / long),
        "border": settings.size / long,
        "center_crop": settings.size / short,
    }[settings.resize]


def _inner(size: tuple[int, int], settings: "ShardSettings") -> tuple[int, int]:
    """Width and height after scaling, before anything is cut off or added."""
    scale = _scale(size, settings)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _fits(size: tuple[int, int], settings: "ShardSettings") -> bool:
    square = settings.resize not in ("border", "center_crop") or size[0] == size[1]
    return square and _inner(size, settings) == size


def _draft(image: Image.Image, settings: "ShardSettings") -> None:
    """Let the JPEG decoder shrink by 2, 4 or 8 what will be shrunk by at least twice as much."""
    scale = 2 * _scale(image.size, settings)
    if scale < 1:
        width, height = (math.ceil(side * scale) for side in image.size)
        image.draft(image.mode, (width, height))


def _resized(image: Image.Image, settings: "ShardSettings") -> Image.Image:
    if _fits(image.size, settings):
        return image
    square = settings.size, settings.size
    if settings.resize == "center_crop":
        return ImageOps.fit(image, square, Image.Resampling.LANCZOS)
    image = image.resize(_inner(image.size, settings), Image.Resampling.LANCZOS)
    if settings.resize != "border":
        return image
    canvas = Image.new(image.mode, square, "white")
    canvas.paste(image, ((settings.size - image.width) // 2, (settings.size - image.height) // 2))
    return canvas


# ---- features ----------------------------------------------------------------------------------


def _features(data: bytes) -> Payload:
    try:
        features = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # of a torn header anything may be raised, MemoryError too
        raise Rejected(f"features do not load: {error}") from error
    if features.dtype.kind not in "fiu" or features.ndim not in (1, 2) or not features.size:
        raise Rejected(f"not features: {features.dtype} of shape {features.shape}")
    if not np.isfinite(features).all():
        raise Rejected(f"features are not finite: {np.isfinite(features).mean():.1%} of them are")
    return Payload(data, "npy", f"features of shape {list(features.shape)}")
