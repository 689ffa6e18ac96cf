"""A picture becomes what the model's own image processor makes of it, to the pixel."""

import io
import json
from functools import partial

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from pipeline.models.preprocessing import (
    PROCESSORS,
    Preprocessing,
    config,
    of_pretrained,
    of_processor,
)
from pipeline.sharding.decoding import decode
from pipeline.sharding.images import checked, open_picture, upright
from schemas.settings import ShardSettings
from tests.helpers import odd_pictures

PHOTOGRAPH = Image.fromarray(load_sample_image("china.jpg"))  # 640 × 427
SHAPES = [(1, 1), (1, 90), (90, 1), (3, 400), (33, 77), (640, 427), (150, 427), (56, 57), (640, 9)]
FILES = odd_pictures.files()
del FILES["sixteen.png"]  # of more than 8 bits transformers keeps the lowest
of = partial(of_processor, model_type="clip", side=56, where="here")


def jpeg(size: tuple[int, int]) -> bytes:
    """A part of a photograph."""
    file = io.BytesIO()
    PHOTOGRAPH.crop((0, 0, *size)).save(file, "JPEG", quality=95)
    return file.getvalue()


PICTURES = {**FILES, **{f"{w} x {h}": jpeg((w, h)) for w, h in SHAPES}}


def processor(name: str, side: int = 56):
    """The one of transformers, of small pictures."""
    own = getattr(transformers, name)()
    crop = getattr(own, "crop_size", None) if getattr(own, "do_center_crop", False) else None
    sides = {key: value for key, value in dict(own.size).items() if value}
    scale = side / (crop.height if crop else sides["height"])
    how = {"size": {key: round(value * scale) for key, value in sides.items()}}
    if crop:
        how["crop_size"] = {"height": side, "width": side}
    return type(own)(**how)


def theirs(own, image: Image.Image) -> np.ndarray:
    """Numbers in 0 … 255."""
    how = {"return_tensors": "np", "do_rescale": False, "do_normalize": False}
    return own(image.convert("RGB"), **how)["pixel_values"][0].astype(int)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_file_that_says_nothing_has_the_defaults_of_transformers(name):
    own = json.loads(getattr(transformers, name)().to_json_string())
    assert own["image_processor_type"] == name
    whole = of(own)
    shape = {"crop_size": 224} if own.get("do_center_crop") else {"size": own["size"]}
    assert of({"image_processor_type": name, **shape}) == whole
    assert of({"image_processor_type": name}) == whole.at(56, 56)  # the vision model's own side
    old = name.replace("ImageProcessor", "FeatureExtractor")
    assert of({"feature_extractor_type": old, **shape}) == whole


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name):
    """Of what shards hold, and of files of any mode that are made upright, RGB and opaque."""
    own = processor(name)
    how = of(json.loads(own.to_json_string()))
    assert how.shape == (56, 56)
    squashed = []
    for told, data in PICTURES.items():
        kept = checked(data, ShardSettings()).data
        expected = theirs(own, Image.open(io.BytesIO(kept)))
        assert np.abs(decode(kept, how) - expected).max() <= 1, told
        squashed.append(np.abs(decode(kept, Preprocessing.squash(56)) - expected).max())
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if shown.has_transparency_data:  # transformers lays it on white as well, of late
            shown = shown.convert("RGBA")
            shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
        found = how.pixels(upright(open_picture(data)))
        assert np.abs(found - theirs(own, shown)).max() <= 1, told
    assert max(squashed) > 10  # what all pictures were before


def test_a_long_strip_is_resized_where_the_crop_is():
    """Its whole would take gigabytes."""
    how = of({"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56})
    ramp = np.linspace(0, 255, 200_000).astype(np.uint8)
    strip = Image.fromarray(np.repeat(ramp[:, None, None], 3, 2).repeat(2, 1))
    found = how.pixels(strip)
    assert found.shape == (3, 56, 56) and np.abs(found.astype(int) - 127).max() <= 1


def test_flags_turn_steps_off():
    own = transformers.CLIPImageProcessor(do_resize=False, crop_size=56)
    picture = odd_pictures.scene((33, 77))  # black is added where it is too small
    assert np.array_equal(of(own.to_dict()).pixels(picture), theirs(own, picture))
    how = of({"do_rescale": False, "do_normalize": False})
    assert (how.rescale, how.mean, how.std) == (1.0, (0.0,) * 3, (1.0,) * 3)


def test_old_sizes_are_understood():
    kind = {"image_processor_type": "CLIPImageProcessor"}
    whole = of({**kind, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}})
    assert whole == of({**kind, "size": 64, "crop_size": 56})
    assert whole == of({**kind, "size": 64, "crop_size": [56, 56]})
    square = {"image_processor_type": "ViTImageProcessor"}
    assert of({**square, "size": 64}).shape == of({**square, "size": [64, 64]}).shape == (64, 64)
    assert of({"image_mean": [0.4] * 3}).mean == (0.4,) * 3  # its class is known by the model
    assert of({**square, "size": {"height": 32, "width": 64}}).shape == (32, 64)
    assert of({**kind, "do_thumbnail": False, "pad_size": None}) == of(kind)  # what is off


def test_another_size_keeps_the_ratio_of_the_crop():
    deit = of({"image_processor_type": "DeiTImageProcessor", "crop_size": 224})
    assert deit.resize == (256, 256) and deit.at(112, 112).resize == (128, 128)
    clip = of({"image_processor_type": "CLIPImageProcessor", "size": 256, "crop_size": 224})
    larger = clip.at(336, 336)
    assert (larger.resize, larger.crop, larger.shape) == (384, (336, 336), (336, 336))
    assert str(clip) == "shorter side to 256 (bicubic), the middle 224 × 224"


def test_the_value_is_written_and_read_again():
    for name in PROCESSORS:
        how = of({"image_processor_type": name})
        assert Preprocessing.of(json.loads(json.dumps(how.state))) == how
        told = json.loads(json.dumps(config(how)))
        assert of(told) == how
        own = transformers.CLIPImageProcessor(**told)
        expected = theirs(own, odd_pictures.scene((33, 77)))
        assert np.abs(how.pixels(odd_pictures.scene((33, 77))) - expected).max() <= 1


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"image_processor_type": "OwlViTImageProcessor"}, "OwlViTImageProcessor is not known"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "many shapes .NaFlex.*one shape"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True of CLIPImageProcessor"),
        ({"rescale_offset": True}, "rescale_offset True of CLIPImageProcessor is not understood"),
        ({"size": {"shortest_edge": 9, "longest_edge": 9}}, "size .*longest_edge.* not understood"),
        ({"crop_size": {"shortest_edge": 9}}, "crop_size .* is no height and width"),
        ({"do_center_crop": False}, "size .*shortest_edge.* without a crop .* many shapes"),
        ({"do_center_crop": False, "do_resize": False}, "without a crop makes pictures of many"),
        ({"resample": 9}, "resample 9 is not understood"),
        ({"image_mean": [0.5]}, "image_mean .0.5. is of 1 channels"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(told, sentence):
    with pytest.raises(ValueError, match=f"^here: .*{sentence}"):
        of(told)


def test_files_are_found_nested_and_alone(tmp_path):
    read = partial(of_pretrained, str(tmp_path), "clip", 56)
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json.*save_pretrained"):
        read()
    alone = {"image_processor_type": "ViTImageProcessor", "size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(alone))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert read().shape == (32, 32)
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": [48, 48]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert (read().shape, read().interpolation) == ((48, 48), "bicubic")
    with pytest.raises(ValueError, match=r"a model of type swin\) is not known"):
        of_processor({}, "swin", 56, "here")
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"processor_config.json of .* cannot be read"):
        read()
