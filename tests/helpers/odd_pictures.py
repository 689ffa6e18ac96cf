"""Pictures that are not simply what their bytes decode to, by name: the bytes of their files."""

import io

import numpy as np
from PIL import Image

SIZE = (90, 60)


def scene(size=SIZE) -> Image.Image:
    """Of no symmetry: turned or cut it is another one."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 4, size[1]))
    pixels = np.uint8(127.5 + 127 * np.stack([np.sin(x + k) * np.cos(y * k) for k in range(3)], -1))
    pixels[: size[1] // 3, : size[0] // 4] = (255, 0, 0)
    return Image.fromarray(pixels)


def files() -> dict[str, bytes]:
    """A file of every kind."""
    plain, grey = scene(), scene().convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp = Image.linear_gradient("L").resize(SIZE)
    clear = plain.copy()
    clear.putalpha(ramp)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 17)
    return {
        "plain.jpg": _file(plain, "JPEG"),
        "large.jpg": _file(scene((700, 500)), "JPEG"),
        "turned.jpg": _file(plain, "JPEG", exif=turned),
        "turned.png": _file(plain, "PNG", exif=turned),
        "clear.png": _file(clear, "PNG"),
        "palette.png": _file(plain.quantize(16), "PNG"),
        "sixteen.png": _file(sixteen, "PNG"),
        "grey.png": _file(grey, "PNG"),
        "one-bit.png": _file(grey.convert("1"), "PNG"),
        "ink.jpg": _file(plain.convert("CMYK"), "JPEG"),
        "scan.tif": _file(plain, "TIFF"),
        "web.webp": _file(clear, "WEBP", lossless=True),
        "old.bmp": _file(plain, "BMP"),
    }


def _file(image: Image.Image, form: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()
