"""The towers' weights spread over the workers, block by block (FSDP)."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from pipeline.models.tuning.blocks import blocks_of
from pipeline.models.two_tower import TwoTower


def shard(model: TwoTower, device: torch.device, dtype: torch.dtype | None) -> None:
    """Every worker keeps a share of the weights; a block is whole only while it runs.

    With `dtype` bfloat16 blocks are gathered and computed in it, but in towers with batch norms,
    whose running moments are float32; gradients are summed in float32.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for tower in (model.image, model.text):  # and not what the losses learn: single numbers
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.modules())
        half = dtype == torch.bfloat16 and not norms  # fp16's range is too small for gradients
        policy = MixedPrecisionPolicy(dtype, torch.float32) if half else MixedPrecisionPolicy()
        _, blocks = blocks_of(tower)
        for module in (*blocks, tower):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for part in ("features", "head"):  # what a frozen tower is called by
            if hasattr(tower, part):
                register_fsdp_forward_method(tower, part)


def gathered_no_more(model: nn.Module) -> None:
    """Give back weights that a forward pass gathered and no backward pass followed.

    Until then a parameter of the model is none of the optimizer's, and the next pass would take
    what was gathered, whatever the weights have become.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
