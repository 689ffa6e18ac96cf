"""The workers of a training: rank, size, and a gather that gradients flow back through."""

import os
import socket

import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.storage import probe, store


class ProcessGroup:
    """This process among `size`; alone where torch.distributed was not started.

    Under torchrun the process group is started here, under Ray Train it is there already.
    """

    def __init__(self):
        if not dist.is_initialized() and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.together else 0
        self.size = dist.get_world_size() if self.together else 1
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all workers, rank after rank: (n, …) -> (size × n, …), differentiable.

        Every worker's loss sends its gradient back to the worker a row came from, and they are
        summed there; with DDP's average over workers, the mean of the workers' losses is what is
        minimised, as if one worker had held all rows.
        """
        return _Gather.apply(rows, self.rank, self.size) if self.together else rows

    def share(self, model: torch.nn.Module, sharding: str) -> torch.nn.Module:
        """The model as it is called in training: gradients are averaged over the workers.

        With "fsdp" every tower's weights are spread over the workers, and gathered while it runs.
        """
        if not self.together:
            return model
        if sharding == "fsdp":
            from torch.distributed.fsdp import fully_shard  # takes a second to import

            mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
            for tower in model.children():
                fully_shard(tower, mesh=mesh)
            return model
        return torch.nn.parallel.DistributedDataParallel(model)

    def gather_messages(self, said: str) -> list[str]:
        """What the workers have to say, each with its host's name; empty sayings are left out."""
        everything = [(socket.gethostname(), said)] * self.size
        if self.together:
            dist.all_gather_object(everything, everything[0])
        return [f"{host} {text}" for host, text in everything if text]

    def barrier(self) -> None:
        if self.together:
            dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a number over the workers."""
        if not self.together:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.size


def check_storage(world: ProcessGroup, folder: str) -> None:
    """Raises unless every worker reads in the folder what another one wrote there."""
    mine, other = (str((world.rank + shift) % world.size) for shift in (0, 1))
    problem = ""
    try:
        probe.write(folder, mine)
    except OSError as error:
        problem = f"cannot write in {folder}: {error}"
    world.barrier()  # now all are written
    try:
        if not problem:
            probe.read(folder, other)
    except OSError as error:
        problem = f"cannot read {store.join(folder, other)} ({error}), which another worker wrote"
    problems = world.gather_messages(problem)
    if world.rank == 0:
        store.remove(folder)
    if problems:
        raise InputError(
            f"{problems[0]}; --root must be storage that every node reads and writes (a shared "
            "folder or an object store)"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, rank, size):
        ctx.rank, ctx.count = rank, len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count], None, None
