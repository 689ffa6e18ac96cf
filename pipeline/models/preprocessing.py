"""How a picture becomes the numbers of an image tower: one value, applied alike everywhere.

Read from the processor file of a Hugging Face model and kept with every model trained from it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

INTERPOLATIONS = {kind.name.lower(): kind for kind in Image.Resampling}
LARGEST = 2**24  # pixels before the crop; of a longer strip no more is resized than is kept
FILES = ("processor_config.json", "preprocessor_config.json")  # the first may hold it nested


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop in the middle, rescale, normalize: in this order. Sides are in pixels.

    Interpolation is Pillow's, which takes all pixels into account where it makes a picture smaller
    (antialiased). The towers get pixels (3, H, W) uint8 and do the last two steps on their device.
    """

    resize: tuple[int, int] | int | None  # to (height, width); the shorter side to; not at all
    crop: tuple[int, int] | None  # (height, width) of the middle; black is added where it is short
    interpolation: str  # a name of INTERPOLATIONS
    rescale: float = 1 / 255  # what a pixel of 0 … 255 is multiplied with
    mean: tuple[float, ...] = (0.5,) * 3  # of a channel, taken off after that
    std: tuple[float, ...] = (0.5,) * 3  # and this is divided by
    shrink: bool = False  # the JPEG decoder may shrink first: fast, and some levels off

    @classmethod
    def squash(cls, size: int, **statistics: Any) -> "Preprocessing":
        """A square, whatever the picture's shape: of towers that are trained from scratch."""
        return cls((size, size), None, "bilinear", shrink=True, **statistics)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Preprocessing":
        """The one that had this `state`, also after it was JSON."""
        lists = {k: tuple(v) for k, v in state.items() if isinstance(v, list)}
        return cls(**{**state, **lists})

    @property
    def state(self) -> dict[str, Any]:
        """What `of` makes it again from (JSON-able)."""
        return asdict(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what the tower gets."""
        shape = self.crop or self.resize
        assert isinstance(shape, tuple)
        return shape

    def at(self, height: int, width: int) -> "Preprocessing":
        """The same of another shape; a shorter side stays in its ratio to the crop."""
        if self.crop is None:
            return replace(self, resize=(height, width))
        resize, scale = self.resize, min(height, width) / min(self.crop)
        if isinstance(resize, int):
            resize = round(resize * scale)
        elif resize is not None:
            resize = round(resize[0] * scale), round(resize[1] * scale)
        return replace(self, resize=resize, crop=(height, width))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8 of an upright picture of any size and mode."""
        if self.shrink:  # a JPEG decodes at the next larger eighth, for a fraction
            height, width = self.shape
            image.draft("RGB", (width, height))
        return np.asarray(self.picture(image.convert("RGB"))).transpose(2, 0, 1)

    def picture(self, image: Image.Image) -> Image.Image:
        """An RGB picture, resized and cropped."""
        how = INTERPOLATIONS[self.interpolation]
        width, height = inner = self._inner(image.size)
        if self.crop is None:
            return image if inner == image.size else image.resize(inner, how)
        tall, wide = self.crop
        left, top = (width - wide) // 2, (height - tall) // 2
        box = left, top, left + wide, top + tall
        if width * height > LARGEST and min(left, top) >= 0:  # nearly the same pixels
            x, y = image.width / width, image.height / height
            part = left * x, top * y, (left + wide) * x, (top + tall) * y
            return image.resize((wide, tall), how, box=part)
        return (image if inner == image.size else image.resize(inner, how)).crop(box)

    def _inner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height before the crop."""
        if self.resize is None:
            return size
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        long = int(self.resize * max(size) / min(size))
        return (self.resize, long) if size[0] <= size[1] else (long, self.resize)

    def __str__(self) -> str:
        """In words, for a line of a log."""
        size = "{} × {}".format
        steps = []
        if isinstance(self.resize, int):
            steps.append(f"shorter side to {self.resize} ({self.interpolation})")
        elif self.resize is not None:
            steps.append(f"to {size(*self.resize)} ({self.interpolation})")
        if self.crop is not None:
            steps.append(f"the middle {size(*self.crop)}")
        return ", ".join(steps)


# ---- of a Hugging Face model ---------------------------------------------------------------------

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
MIDDLE = {"size": {"shortest_edge": 224}, "do_center_crop": True}
SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
# What an image processor does where its file is silent; known are those of the steps above.
ALL: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "crop_size": 224,
}
ALL |= {"rescale_factor": 1 / 255, "default_to_square": True}
SHORTER = {**ALL, "default_to_square": False}  # a size that is one number is the shorter side
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {**SHORTER, **CLIP, **MIDDLE},
    "ChineseCLIPImageProcessor": {**SHORTER, **CLIP, **MIDDLE},
    "BitImageProcessor": {**SHORTER, **CLIP, **MIDDLE},
    "SiglipImageProcessor": {**SHORTER, **HALVES, **SQUARE},
    "BlipImageProcessor": {**ALL, **CLIP, **SQUARE, "size": {"height": 384, "width": 384}},
    "ViTImageProcessor": {**ALL, **HALVES, **SQUARE, "resample": 2},
    "BeitImageProcessor": {**ALL, **HALVES, **SQUARE},
    "DeiTImageProcessor": {**ALL, **HALVES, **MIDDLE, "size": {"height": 256, "width": 256}},
}
# The one of a file that names none, by the type of the vision model.
OF_MODELS = {name.removesuffix("ImageProcessor").lower(): name for name in PROCESSORS}
OF_MODELS |= {"chinese_clip": "ChineseCLIPImageProcessor", "metaclip_2": "CLIPImageProcessor"}
OF_MODELS |= {"dinov2": "BitImageProcessor", "siglip2": "Siglip2ImageProcessor"}
# Settings that change no pixel: pictures are RGB here and all of one shape.
SILENT = {"do_convert_rgb", "do_pad", "do_reduce_labels", "image_processor_type", "processor_class"}
SILENT |= {"feature_extractor_type", "return_tensors", "data_format", "input_data_format"}
SILENT |= {"_valid_processor_keys", "device", "disable_grouping", "transformers_version"}
SILENT |= {"model_input_names"}


def of_pretrained(name: str, model_type: str, side: int) -> Preprocessing:
    """That of a model's folder or name; `side` is its vision model's own (pixels).

    Raises ValueError where no file says it, or says what is not understood.
    """
    from transformers.utils import cached_file

    for file in FILES:
        where = f"{file} of model.pretrained {name!r}"
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            told = json.loads(Path(found).read_text("utf-8")) if found else None
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        if told and file == FILES[0]:
            told = told.get("image_processor")
        if told is not None:
            return of_processor(told, model_type, side, where)
    raise ValueError(
        f"model.pretrained {name!r} has no {FILES[1]}, so how its pictures are made is not known; "
        "save its image processor beside it (processor.save_pretrained(FOLDER))"
    )


def of_processor(told: dict[str, Any], model_type: str, side: int, where: str) -> Preprocessing:
    """That of an image processor's settings; a ValueError names `where` they stand, and the key."""
    kind = told.get("image_processor_type") or told.get("feature_extractor_type")
    kind = kind or OF_MODELS.get(model_type) or f"(none, of a model of type {model_type})"
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    if kind == "Siglip2ImageProcessor":
        raise ValueError(
            f"{where}: image_processor_type {kind} makes pictures of many shapes (NaFlex), and a "
            "batch here holds one; take a SigLIP 2 of one shape (its name ends in patchN-SIDE)"
        )
    if kind not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        raise ValueError(f"{where}: image_processor_type {kind} is not known; known: {known}")
    told = {key: value for key, value in told.items() if value is not None}
    defaults = PROCESSORS[kind]
    for key in sorted(told.keys() - defaults.keys() - SILENT):
        if told[key] is not False:
            raise ValueError(
                f"{where}: {key} {told[key]!r} of {kind} is not understood, so pictures would be "
                "other than the model's own; set it to null if it changes none"
            )
    found = {**defaults, **told}
    whole = bool(found["default_to_square"])
    resize = _sides(found["size"], whole, f"{where}: size") if found["do_resize"] else None
    crop = None
    if found["do_center_crop"]:
        crop = _sides(found["crop_size"], True, f"{where}: crop_size")
    if isinstance(crop, int):
        raise ValueError(f"{where}: crop_size {found['crop_size']!r} is no height and width")
    if not isinstance(crop or resize, tuple):
        raise ValueError(
            f"{where}: size {found['size']!r} without a crop makes pictures of many shapes, and a "
            "batch here holds one; set do_center_crop and crop_size, or a height and width"
        )
    how = Preprocessing(
        resize,
        crop,
        _interpolation(found["resample"], f"{where}: resample"),
        found["rescale_factor"] if found["do_rescale"] else 1.0,
        _channels(found["image_mean"] if found["do_normalize"] else 0.0, f"{where}: image_mean"),
        _channels(found["image_std"] if found["do_normalize"] else 1.0, f"{where}: image_std"),
    )
    return how if ("crop_size" if crop else "size") in told else how.at(side, side)


def config(how: Preprocessing) -> dict[str, Any]:
    """The contents of a preprocessor_config.json that says the same, for transformers."""
    size = how.resize if how.resize is not None else how.shape
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": how.resize is not None,
        "size": {"shortest_edge": size} if isinstance(size, int) else _named(size),
        "resample": int(INTERPOLATIONS[how.interpolation]),
        "do_center_crop": how.crop is not None,
        "crop_size": _named(how.shape),
        "do_rescale": True,
        "rescale_factor": how.rescale,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
        "do_convert_rgb": True,
    }


def _named(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _sides(told: Any, whole: bool, where: str) -> tuple[int, int] | int:
    """(height, width), or the shorter side: of a number, a list or a dictionary."""
    if isinstance(told, int):
        return (told, told) if whole else told
    if isinstance(told, list | tuple) and len(told) == 2:
        return told[0], told[1]
    if isinstance(told, dict):
        sides = {name: side for name, side in told.items() if side is not None}
        if sides.keys() == {"height", "width"}:
            return sides["height"], sides["width"]
        if sides.keys() == {"shortest_edge"}:
            return sides["shortest_edge"]
    raise ValueError(
        f"{where} {told!r} is not understood; known are a number, height and width, and "
        "shortest_edge"
    )


def _interpolation(told: Any, where: str) -> str:
    names = {int(kind): name for name, kind in INTERPOLATIONS.items()}
    if told not in names:
        raise ValueError(f"{where} {told!r} is not understood; known are {names}")
    return names[told]


def _channels(told: Any, where: str) -> tuple[float, ...]:
    values = tuple(told) if isinstance(told, list | tuple) else (told,) * 3
    if len(values) != 3:
        raise ValueError(f"{where} {told!r} is of {len(values)} channels; pictures here are RGB")
    return values
