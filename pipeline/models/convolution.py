"""A small convolutional image tower that trains from scratch."""

import itertools

import torch
import torch.distributed as dist
from torch import nn

from pipeline.models.two_tower import TowerInputs
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
            *[_stage(a, b, stride=1) for a, b in itertools.pairwise(widths)],
        )
        self.project = nn.Linear(2 * widths[-1], dim)

    @classmethod
    def from_settings(cls, settings: ModelSettings, given: TowerInputs) -> "ConvolutionTower":
        if given.features is not None:
            raise ValueError(
                "model.image 'pixels' needs image shards, these hold features; use 'regions'"
            )
        return cls(settings.width, settings.dim)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = images_BCHW.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        x = self.stages(x)
        return self.project(torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1))


def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Convolution, norm and ReLU; the side is halved by the stride or by pooling.

    Pooling comes before the ReLU: the same values, and a quarter of them to clamp.
    """
    convolution = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    pool = [nn.MaxPool2d(2)] if stride == 1 else []
    return nn.Sequential(convolution, GlobalBatchNorm(c_out), *pool, nn.ReLU())


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the whole global batch, whatever the number of workers.

    The norm of a worker's own share would make the model depend on how the batch was shared out.
    (torch's SyncBatchNorm is this for GPUs alone.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or not together:
            return super().forward(x)
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return y


class _Normalise(torch.autograd.Function):
    """x normalised by the moments of all workers' x; shares are of equal size.

    x may be of half precision; its moments are float32 as torch's are.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        moments = torch.stack([mean, variance + mean.square()])
        dist.all_reduce(moments)
        mean, square = moments / dist.get_world_size()
        variance = square - mean.square()
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.mark_non_differentiable(mean, variance)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, weight, mean, rstd = ctx.saved_tensors
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, rstd, True, 0.0, [False, True, True]
        )
        # What every sample's gradient owes to the mean and the variance of them all.
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums)
        by_weight, by_bias = sums / (x.numel() // x.shape[1] * dist.get_world_size())
        scale = weight * rstd
        slope = -scale * rstd * by_weight
        shift = -scale * by_bias - slope * mean
        at = (None, slice(None), None, None)
        grad_x = torch.addcmul(shift[at], x, slope[at]).addcmul_(grad_y, scale[at])
        grad_x = grad_x.to(x.dtype)
        return grad_x, grad_weight, grad_bias, None
