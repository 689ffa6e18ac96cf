"""A table of bad input: each kind ends in quarantine with its reason, or is refused in a sentence.

Beside every bad sample stands a good one, which has to come through.
"""

import csv
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.storage import store
from tests.helpers.datasets import checked, member, picture, table_of, written

# ---- files that are not the picture they should be ---------------------------------------------


def encoded(image, form="JPEG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def noise(mode="RGB", size=(40, 30)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


JPEG, PNG = encoded(noise()), encoded(noise(), "PNG")


def png(width, height, bits=8, colour=2, body=b"") -> bytes:
    """A PNG that claims what it is told."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    chunks += [(b"IDAT", body or zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        out += struct.pack(">I", len(data)) + name + data
        out += struct.pack(">I", zlib.crc32(name + data))
    return out


def jpeg_of(width, height) -> bytes:
    """A JPEG whose header claims another size."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


FEATURES = npy(np.ones((3, 4), np.float32))
FILES = {  # bytes of the file, and how its reason begins
    "nothing": (b"", "empty file"),
    "one byte": (b"\xff", "not an image"),
    "zeros": (bytes(5000), "not an image"),
    "HTML": (b"<!DOCTYPE html><html>404 Not Found</html>", "not an image"),
    "JSON": (b'{"error": "rate limit"}', "not an image"),
    "a ZIP": (b"PK\x03\x04" + bytes(100), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "PDF": (b"%PDF-1.7\n", "not an image"),
    "a magic number alone": (b"\xff\xd8\xff\xe0", "not an image"),
    "a JPEG torn in its header": (JPEG[:100], "image does not decode"),
    "a JPEG torn after its header": (JPEG[: JPEG.index(b"\xff\xda") + 20], "image does not decode"),
    "a JPEG torn in the middle": (JPEG[: len(JPEG) // 2], "image does not decode"),
    "a JPEG torn near its end": (JPEG[:-60], "image does not decode"),
    "a JPEG followed from its middle by zeros": (
        JPEG[: len(JPEG) // 2] + bytes(9),
        "image does not decode",
    ),
    "a progressive JPEG torn": (
        encoded(noise(), progressive=True)[:-200],
        "image does not decode",
    ),
    "a JPEG that claims 65,500 × 65,500": (jpeg_of(65500, 65500), "too many pixels"),
    "a JPEG without width": (jpeg_of(0, 30), "not an image"),
    "a PNG torn": (PNG[: len(PNG) // 2], "image does not decode"),
    "a PNG with a wrong checksum": (PNG[:200] + b"\x00\x01\x02" + PNG[203:], "image does not"),
    "a PNG that claims 2³¹ × 2³¹": (png(2**31 - 1, 2**31 - 1), "too many pixels"),
    "a PNG that claims 50,000 × 50,000": (png(50_000, 50_000), "too many pixels"),
    "a PNG without pixels": (png(0, 0), "not an image"),
    "a PNG with fewer pixels than it claims": (png(900, 900), "image does not decode"),
    "a PNG of negative width": (png(2**32 - 5, 10), "too many pixels"),
    "an animated GIF": (
        encoded(noise("P"), "GIF", save_all=True, append_images=[Image.new("P", (40, 30))]),
        "animated: GIF",
    ),
    "an animated PNG": (
        encoded(noise(), "PNG", save_all=True, append_images=[noise("L").convert("RGB")]),
        "animated: PNG",
    ),
    "an animated WebP": (
        encoded(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")]),
        "animated: WEBP",
    ),
    "a TIFF of two pages": (
        encoded(noise(), "TIFF", save_all=True, append_images=[noise()]),
        "animated: TIFF",
    ),
    "a torn WebP": (encoded(noise(), "WEBP")[:-300], "image does not decode"),
    "a torn BMP": (encoded(noise(), "BMP")[:-300], "image does not decode"),
    "a torn GIF": (encoded(noise("P"), "GIF")[:-500], "image does not decode"),
    "a TIFF of floats": (
        encoded(Image.fromarray(np.ones((5, 5), np.float32)), "TIFF"),
        "numbers of unknown range",
    ),
    "features with NaN": (npy(np.array([1, np.nan])), "features are not finite"),
    "features with ∞": (npy(np.array([np.inf, 1], np.float16)), "features are not finite"),
    "features torn": (FEATURES[:-5], "features do not load"),
    "features torn in their header": (FEATURES[:40], "features do not load"),
    "features that claim terabytes": (
        FEATURES.replace(b"(3, 4), }" + b" " * 9, b"(99999999, 99999)}"),
        "features do not load",
    ),
    "features that are a pickle": (npy(np.array([Bomb()], object)), "features do not load"),
    "features that are text": (npy(np.array(["a", "b"])), "not features"),
    "features that are records": (npy(np.zeros(3, "i4,f4")), "not features"),
    "features that are one number": (npy(np.float32(1)), "not features"),
    "features of four dimensions": (npy(np.zeros((2, 2, 2, 2))), "not features"),
    "features of nothing": (npy(np.zeros((0, 4))), "not features"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_the_picture_it_should_be_is_quarantined(tmp_path, name, monkeypatch):
    data, reason = FILES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(data)
    (tmp_path / "good.jpg").write_bytes(JPEG)
    rows = [{"image_id": name, "uri": f"{tmp_path}/{name}.jpg"} for name in ("bad", "good")]
    bad, good = written(tmp_path / "shard", rows)
    assert bad["reason"].startswith(reason) and len(bad["reason"]) <= 500
    assert bad["key"] is None and member(good) == JPEG
    again, _ = written(tmp_path / "again", rows)
    assert again["reason"] == bad["reason"]
    assert not (tmp_path / "unpickled").exists()


# Unusual, but a picture all the same: its bytes, and the mode of what is in the tar.
UNUSUAL = {
    "a JPEG called .png": (JPEG, "RGB"),
    "a PNG of 16 bits": (encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"), "L"),
    "a CMYK JPEG": (encoded(noise("CMYK")), "RGB"),
    "a PNG with palette and transparency": (encoded(noise("P"), "PNG", transparency=3), "RGB"),
    "a PNG of one bit": (encoded(noise("1"), "PNG"), "L"),
    "a GIF of one frame": (encoded(noise("P"), "GIF"), "RGB"),
    "a GIF with a comment of 100 kB": (encoded(noise("P"), "GIF", comment=b"x" * 100_000), "RGB"),
    "a JPEG with rubbish behind its end": (JPEG + b"rubbish" * 50, "RGB"),
    "a JPEG with damaged EXIF": (encoded(noise(), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), "RGB"),
    "one pixel": (encoded(noise(size=(1, 1))), "RGB"),
    "a line of 20,000 pixels": (encoded(noise(size=(20_000, 1))), "RGB"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_picture_is_in_the_tar(tmp_path, name):
    data, mode = UNUSUAL[name]
    (tmp_path / "x.png").write_bytes(data)
    (row,) = written(tmp_path / "shard", [{"image_id": "x", "uri": f"{tmp_path}/x.png"}])
    image = Image.open(io.BytesIO(member(row)))
    image.load()
    assert row["reason"] is None and image.mode == mode
    assert image.size == Image.open(io.BytesIO(data)).size == (row["width"], row["height"])


# ---- files that cannot be read -----------------------------------------------------------------


def loop(folder) -> str:
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    return f"{folder}/loop.jpg"


def dangling(folder) -> str:
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    return f"{folder}/dangling.jpg"


def directory(folder) -> str:
    (folder / "folder.jpg").mkdir()
    return f"{folder}/folder.jpg"


def pipe(folder) -> str:
    os.mkfifo(folder / "pipe.jpg")  # reading it would wait for ever
    return f"{folder}/pipe.jpg"


def sparse(folder) -> str:
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(2**40)
    return f"{folder}/sparse.jpg"


UNREADABLE = {  # the URI, and how its reason begins
    "no file": (lambda folder: f"{folder}/none.jpg", "file missing"),
    "no folder": (lambda folder: f"{folder}/none/none.jpg", "file missing"),
    "a symbolic link to itself": (loop, "unreadable (Too many levels of symbolic links)"),
    "a symbolic link to nothing": (dangling, "file missing"),
    "a folder": (directory, "unreadable (Is a directory)"),
    "a file as a folder": (lambda folder: f"{folder}/good.jpg/x", "unreadable (Not a directory)"),
    "a pipe": (pipe, "not a regular file"),
    "a device without end": (lambda folder: "/dev/zero", "not a regular file"),
    "a terabyte": (sparse, "file too large"),
    "a name of 4,000 characters": (
        lambda folder: f"{folder}/{'x' * 4000}.jpg",
        "unreadable (File name too long)",
    ),
    "a name with a NUL": (lambda folder: f"{folder}/a\0b.jpg", "unreadable: embedded null byte"),
    "a URI of no known kind": (lambda folder: "gopher://host/x.jpg", "unreadable"),
    "an object that is not there": (lambda folder: "memory://nowhere/x.jpg", "file missing"),
    "a host that does not answer": (lambda folder: "http://127.0.0.1:9/x.jpg", "fetch failed"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_quarantined(tmp_path, name):
    make, reason = UNREADABLE[name]
    (tmp_path / "good.jpg").write_bytes(JPEG)
    uris = {"bad": make(tmp_path), "good": f"{tmp_path}/good.jpg"}
    rows = [{"image_id": name, "uri": uri} for name, uri in uris.items()]
    bad, good = written(tmp_path / "shard", rows, source={"fetch_retries": 0})
    assert bad["reason"].startswith(reason) and len(bad["reason"]) <= 500
    assert member(good) == JPEG


@pytest.mark.parametrize("why", ["EACCES", "EIO", "ESTALE", "ETIMEDOUT"])
def test_a_refusal_of_the_storage_is_quarantined_in_its_words(tmp_path, why, monkeypatch):
    """Of missing permission, too: whoever runs this as root would be let in."""
    import errno

    number = getattr(errno, why)
    (tmp_path / "good.jpg").write_bytes(JPEG)
    read = store.read_bytes

    def refusing(uri, *where):
        if uri.endswith("bad.jpg"):
            raise OSError(number, os.strerror(number), uri)
        return read(uri, *where)

    monkeypatch.setattr(store, "read_bytes", refusing)
    rows = [{"image_id": name, "uri": f"{tmp_path}/{name}.jpg"} for name in ("bad", "good")]
    bad, good = written(tmp_path / "shard", rows)
    assert bad["reason"] == f"unreadable ({os.strerror(number)}): {tmp_path}/bad.jpg"
    assert good["reason"] is None


# ---- names and captions ------------------------------------------------------------------------

NAMES = {
    "emoji": "🐕‍🦺.jpg",
    "right to left": "كلب.jpg",
    "a line break": "line\nbreak.jpg",
    "blanks": "  two  blanks .jpg",
    "a leading dash": "-rf.jpg",
    "several dots": "a.b.c.jpg",
    "quotes": '"it\'s".jpg',
    "a percent sign": "100%25.jpg",
    "a number sign": "a#1.jpg",
    "200 characters": "x" * 200 + ".jpg",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_an_odd_name_is_in_the_tar_under_its_id(tmp_path, name):
    file = NAMES[name]
    (tmp_path / file).write_bytes(JPEG)
    (row,) = checked(table_of(tmp_path, [(file, "a dog", "train")]), tmp_path / "run")
    assert row["reason"] is None and member(row) == JPEG
    assert row["image_id"] == file.removesuffix(".jpg")
    assert "." not in row["key"] and "/" not in row["key"] and row["key"].isascii()


CAPTIONS = {  # what is kept, or how the reason begins
    "emoji": ("a 🐕‍🦺 and 👩‍👩‍👧", None),
    "right to left": ("\u200fכלב רץ\u200f", None),
    "combining marks": ("e\u0301te\u0301", None),
    "markup": ("<script>alert(1)</script> & 'quotes'", None),
    "a control character": ("bell\x07", None),
    "a private character": ("\U0010ffff", None),
    "nothing": ("", "empty caption"),
    "blanks alone": (" \t\u3000\n", "empty caption"),
    "a NUL": ("a\0dog", "caption with a NUL byte"),
    "a million characters": ("dog " * 250_000, "caption too long: 999,999 characters"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_kept_exactly_or_quarantined(tmp_path, name):
    text, reason = CAPTIONS[name]
    (tmp_path / "a.jpg").write_bytes(JPEG)
    both = [{"caption_id": "a#0", "text": text}, {"caption_id": "a#1", "text": "a dog"}]
    rows = [{"image_id": "a", "uri": f"{tmp_path}/a.jpg", "captions": both}]
    (row,) = written(tmp_path / "shard", rows)
    assert [c["text"] for c in row["captions"]] == ["a dog"] if reason else [text, "a dog"]
    assert all(c["reason"].startswith(reason) for c in row["captions_rejected"])
    (row,) = written(tmp_path / "alone", [rows[0] | {"captions": both[:1]}])
    assert (row["reason"] or "").startswith(reason or "")
    assert (row["reason"] is None) == (reason is None)


def test_captions_that_are_missing_are_quarantined(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    uri = f"{tmp_path}/a.jpg"
    rows = [{"image_id": "none", "uri": uri, "captions": []}]
    rows += [{"image_id": "null", "uri": uri, "captions": [{"caption_id": "n", "text": None}]}]
    reasons = [row["reason"] for row in written(tmp_path / "shard", rows)]
    assert reasons == ["no caption: none is given", "empty caption: n"]


# ---- all at once -------------------------------------------------------------------------------


def test_ids_that_differ_in_case_alone_are_two(tmp_path):
    for name in ("dog.jpg", "DOG.jpg"):
        picture(tmp_path / name)
    rows = checked(
        table_of(tmp_path, [(name, "a", "train") for name in ("dog.jpg", "DOG.jpg")]),
        tmp_path / "run",
    )
    assert sorted(row["key"] for row in rows) == ["DOG", "dog"]


def test_a_shard_of_nothing_but_bad_input_stops_the_stage_and_names_the_kinds(tmp_path):
    for number, (data, _) in enumerate(FILES.values()):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    rows = [(f"{number}.jpg", "a", "train") for number in range(len(FILES))]
    with pytest.raises(InputError) as error:
        checked(table_of(tmp_path, rows), tmp_path / "run")
    assert f"{len(FILES)} of {len(FILES)} samples were rejected" in str(error.value)
    with open(tmp_path / "run" / "2-shards" / "rejected.csv", encoding="utf-8") as file:
        reasons = {row["image_id"]: row["reason"] for row in csv.DictReader(file)}
    for number, (_, reason) in enumerate(FILES.values()):
        assert reasons[str(number)].startswith(reason)


def test_the_table_is_as_long_as_it_claims():
    assert len({**FILES, **UNREADABLE, **NAMES, **CAPTIONS}) >= 40
