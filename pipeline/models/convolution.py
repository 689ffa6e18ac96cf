"""A small convolutional image tower that trains from scratch."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from schemas.settings import ModelSettings

WIDTHS = (1, 2, 4, 8)  # of the stages, in units of the first one's channels


class ConvolutionTower(nn.Module):
    """Four stages that each halve the side, then maximum and mean over places.

    (B, 3, S, S) uint8 -> (B, dim). What is there counts more than where: the pooled vector of a
    scene is the same wherever its things lie.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        widths = [width * factor for factor in WIDTHS]
        self.stages = nn.Sequential(
            _stage(3, widths[0], stride=2),
            *[_stage(a, b, stride=1) for a, b in zip(widths, widths[1:], strict=False)],
        )
        self.project = nn.Linear(2 * widths[-1], dim)

    @classmethod
    def from_settings(cls, settings: ModelSettings, features: int | None) -> "ConvolutionTower":
        if features is not None:
            raise ValueError(
                "model.image 'pixels' needs image shards, these hold features; use 'regions'"
            )
        return cls(settings.width, settings.dim)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = images_BCHW.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        x = self.stages(x)
        return self.project(torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1))


def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Convolution, norm and ReLU; the side is halved by the stride or by pooling after."""
    convolution = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    layers = [convolution, GlobalBatchNorm(c_out), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if stride == 1 else []))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the whole global batch, whatever the number of workers.

    The norm of a worker's own share would make the model depend on how the batch was shared out.
    (torch's SyncBatchNorm is this for GPUs alone.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or not together:
            return super().forward(x)
        size = dist.get_world_size()
        x32 = x.float()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])
        mean, square = all_reduce(moments) / size  # shares are equal: their mean is the whole's
        variance = square - mean.square()
        with torch.no_grad():
            count = x.numel() // x.shape[1] * size
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
