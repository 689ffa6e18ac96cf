"""Pictures on their way into a shard: which keep their bytes, and what becomes of the others."""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image, ImageChops

from pipeline.sharding import images
from pipeline.sharding.images import Rejected
from schemas.settings import ShardSettings
from tests.helpers.datasets import picture

KEEP = ShardSettings()


def smooth(width, height) -> Image.Image:
    """A picture without noise, so that two ways to shrink it can be compared."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = [np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)]
    return Image.fromarray(np.uint8(127.5 + 127 * np.stack(waves, -1)))


def encoded(image: Image.Image, form="JPEG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def decoded(data: bytes, **settings) -> Image.Image:
    """The picture as the tar holds it."""
    payload = images.checked(data, ShardSettings(**settings))
    image = Image.open(io.BytesIO(payload.data))
    assert image.size == (payload.width, payload.height)
    assert image.format == {"jpg": "JPEG", "png": "PNG"}[payload.ending]
    return image


# ---- what is kept, what is changed -------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG")]
)
@pytest.mark.parametrize("check", [True, False])
def test_pictures_that_every_trainer_reads_keep_their_bytes(tmp_path, mode, form, check):
    data = picture(tmp_path / "a", mode, form=form).read_bytes()
    payload = images.checked(data, ShardSettings(decode_check=check))
    ending = {"JPEG": "jpg", "PNG": "png"}[form]
    assert payload == (data, ending, "pictures", 24, 16)


def test_a_photo_with_a_second_picture_behind_it_keeps_its_bytes():
    data = encoded(smooth(40, 30), "MPO", save_all=True, append_images=[smooth(40, 30)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert images.checked(data, KEEP)[:2] == (data, "jpg")


@pytest.mark.parametrize(
    ("mode", "form", "becomes"),
    [
        *[("RGBA", "PNG", "RGB"), ("P", "PNG", "RGB"), ("P", "GIF", "RGB"), ("LA", "PNG", "RGB")],
        *[("CMYK", "JPEG", "RGB"), ("CMYK", "TIFF", "RGB"), ("RGB", "WEBP", "RGB")],
        *[("RGB", "BMP", "RGB"), ("L", "TIFF", "L"), ("1", "PNG", "L"), ("YCbCr", "TIFF", "RGB")],
        *[("RGB", "PPM", "RGB"), ("RGB", "JPEG2000", "RGB"), ("RGB", "AVIF", "RGB")],
    ],
)
def test_pictures_of_other_kinds_become_rgb_or_grey_jpeg(tmp_path, mode, form, becomes):
    if mode == "LA":
        picture(tmp_path / "a", "L", form="PNG")
        grey = Image.open(tmp_path / "a").convert("LA")
        data = encoded(grey, form)
    else:
        data = picture(tmp_path / "a", mode, form=form).read_bytes()
    image = decoded(data)
    assert (image.format, image.mode, image.size) == ("JPEG", becomes, (24, 16))
    assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(mode):
    colour, how = {
        "RGBA": ((255, 0, 0, 0), {}),
        "LA": ((0, 0), {}),
        "P": (0, {"transparency": 0}),
        "RGB": ((255, 0, 0), {"transparency": (255, 0, 0)}),
        "L": (0, {"transparency": 0}),
    }[mode]
    image = decoded(encoded(Image.new(mode, (8, 8), colour), "PNG", **how))
    assert np.asarray(image.convert("L")).min() >= 254


def test_half_transparent_red_is_pink():
    image = decoded(encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 128)), "PNG"))
    assert np.abs(np.asarray(image)[8, 8].astype(int) - (255, 127, 127)).max() <= 3


def test_sixteen_bits_are_scaled_to_eight():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = decoded(encoded(Image.fromarray(ramp), "PNG"))
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(float) - ramp / 257).max() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_exif_says(form, orientation):
    corner = Image.new("RGB", (48, 32), "black")
    corner.paste("white", (0, 0, 24, 16))  # upper left quarter
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encoded(corner, form, exif=exif)
    image = decoded(data)
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    assert image.getexif().get(images.ORIENTATION, 1) == 1
    at = {  # where the quarter is once the picture is upright
        **{1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1)},
        **{5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)},
    }[orientation]
    grey = np.asarray(image.convert("L"))
    height, width = grey.shape
    quarters = {
        (x, y): grey[y * height // 2 :, x * width // 2 :][: height // 2, : width // 2].mean()
        for x in (0, 1)
        for y in (0, 1)
    }
    assert max(quarters, key=quarters.get) == at


def test_damaged_exif_turns_nothing_and_costs_no_picture():
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    data = encoded(smooth(48, 32), exif=exif).replace(b"MM\x00*", b"MM\xff\xff")
    assert images.checked(data, KEEP)[:2] == (data, "jpg")


# ---- size --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "size", "becomes"),
    [
        *[("keep", (300, 200), (300, 200)), ("keep", (3, 900), (3, 900))],
        *[("shorter", (300, 200), (150, 100)), ("shorter", (200, 300), (100, 150))],
        *[("shorter", (90, 400), (90, 400)), ("shorter", (101, 900), (100, 891))],
        *[("longer", (300, 200), (100, 67)), ("longer", (90, 100), (90, 100))],
        *[("longer", (1000, 1), (100, 1)), ("longer", (60, 70), (60, 70))],
        *[("border", (300, 200), (100, 100)), ("border", (50, 20), (100, 100))],
        *[("center_crop", (300, 200), (100, 100)), ("center_crop", (50, 20), (100, 100))],
        *[("border", (100, 100), (100, 100)), ("center_crop", (100, 100), (100, 100))],
        *[("center_crop", (20_000, 2), (100, 100)), ("border", (2, 20_000), (100, 100))],
    ],
)
def test_the_size_under_each_policy(policy, size, becomes):
    data = encoded(smooth(*size))
    payload = images.checked(data, ShardSettings(resize=policy, size=100))
    assert (payload.width, payload.height) == becomes
    assert (payload.data == data) == (becomes == size)  # encoded anew only where it must be
    assert Image.open(io.BytesIO(payload.data)).size == becomes


def test_a_border_is_white_and_leaves_the_picture_whole_in_the_middle():
    image = np.asarray(decoded(encoded(Image.new("RGB", (80, 40))), resize="border", size=100))
    assert image[:24].min() > 250 and image[76:].min() > 250
    assert image[27:73].max() < 5


def test_a_crop_is_the_middle_square():
    bands = Image.new("L", (90, 30))
    bands.paste(255, (30, 0, 60, 30))
    image = np.asarray(decoded(encoded(bands), resize="center_crop", size=30))
    assert image[:, 2:-2].min() > 240
    enlarged = np.asarray(decoded(encoded(bands), resize="center_crop", size=60))
    assert enlarged[:, 4:-4].min() > 240


def test_a_turned_picture_is_cut_after_it_was_turned():
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    image = decoded(encoded(smooth(900, 300), exif=exif), resize="longer", size=90)
    assert image.size == (30, 90)


@pytest.mark.parametrize("policy", ["shorter", "longer", "border", "center_crop"])
def test_letting_the_decoder_shrink_changes_no_picture_visibly(policy, monkeypatch):
    data = encoded(smooth(1200, 900), quality=95)
    fast = decoded(data, resize=policy, size=96, quality=100)
    monkeypatch.setattr(images, "_draft", lambda image, settings: None)
    slow = decoded(data, resize=policy, size=96, quality=100)
    assert fast.size == slow.size
    assert np.abs(np.asarray(ImageChops.difference(fast, slow)).astype(float)).mean() < 1.0


def test_quality_is_that_of_pictures_encoded_anew_alone(tmp_path):
    data = picture(tmp_path / "a", size=(64, 64), form="PNG").read_bytes()
    assert images.checked(data, ShardSettings(quality=10)).data == data
    small, large = (
        len(images.checked(data, ShardSettings(quality=q, resize="longer", size=60)).data)
        for q in (10, 95)
    )
    assert small < large / 3


# ---- the check ---------------------------------------------------------------------------------


def verdict(data: bytes) -> bool:
    try:
        images.checked(data, KEEP)
        return True
    except Rejected:
        return False


def full_decode(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
        return True
    except Exception:
        return False


KINDS = [
    {"quality": 90},
    {"quality": 90, "progressive": True},
    {"quality": 75, "subsampling": 0, "optimize": True},
    {"quality": 90, "restart_marker_blocks": 3},
    {"quality": 60, "progressive": True, "subsampling": 1},
]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_check_finds_every_torn_jpeg_that_a_full_decode_finds(tmp_path, how, mode):
    """The check reads all coefficients, but lets the decoder make an eighth of the pixels."""
    data = picture(tmp_path / "a", mode, size=(75, 50), form="JPEG", **how).read_bytes()
    lengths = [*range(0, len(data), 23), *range(len(data) - 40, len(data) + 1)]
    found = [verdict(data[:length]) for length in lengths]
    assert found == [full_decode(data[:length]) for length in lengths]
    whole = [length for length, good in zip(lengths, found, strict=True) if good]
    assert len(data) in whole and min(whole) > len(data) - 30


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_check_agrees_with_a_full_decode_on_damaged_bytes(tmp_path, how):
    data = picture(tmp_path / "a", size=(75, 50), form="JPEG", **how).read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(2, len(data))] = rng.randrange(256)
        assert verdict(bytes(damaged)) == full_decode(bytes(damaged))


def test_without_the_check_only_the_header_is_read(tmp_path):
    data = picture(tmp_path / "a", size=(64, 64), form="JPEG").read_bytes()[:-1000]
    with pytest.raises(Rejected, match="image does not decode: image file is truncated"):
        images.checked(data, KEEP)
    assert images.checked(data, ShardSettings(decode_check=False)).data == data


def test_max_pixels_alone_decides_whatever_pillow_thinks(monkeypatch):
    data = encoded(Image.new("L", (100, 90)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 9 times over: Pillow's own error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.checked(data, ShardSettings(max_pixels=9000)).data == data
        with pytest.raises(Rejected, match="too many pixels: 100 × 90"):
            images.checked(data, ShardSettings(max_pixels=8999))
    assert Image.MAX_IMAGE_PIXELS == 1000  # as it was, for others in this process


def test_a_reason_holds_nothing_that_changes_from_run_to_run():
    reasons = set()
    for _ in range(3):
        with pytest.raises(Rejected) as error:
            images.checked(b"<html>404</html>", KEEP)
        reasons.add(str(error.value))
    assert len(reasons) == 1
