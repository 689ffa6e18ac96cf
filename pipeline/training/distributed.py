"""The workers of a training: rank, size, and what they exchange in a step."""

import atexit
import datetime
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import InputError
from pipeline.storage import probe, store
from pipeline.training.loading.waiting import Stopwatch

# Names of torch 2.13; before it there are the others alone.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start(timeout: float | None = None) -> None:
    """Start the process group of the workers that torchrun made, if it did and it is not there.

    `timeout` is what a silent worker is given (seconds).
    """
    if dist.is_initialized() or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return
    if torch.cuda.is_available():  # NCCL asks which one is its worker's
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    how: dict[str, Any] = (
        {} if timeout is None else {"timeout": datetime.timedelta(seconds=timeout)}
    )
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **how)
    atexit.register(dist.destroy_process_group)


class ProcessGroup:
    """This process among `size`; alone where torch.distributed was not started.

    Under torchrun the process group is started here, under Ray Train it is there already.
    """

    def __init__(self):
        start()
        self.together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.together else 0
        self.size = dist.get_world_size() if self.together else 1
        self.size_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))  # on this node
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions and GRUs
        else:
            self.device = torch.device("cpu")
        self.exchanging = Stopwatch(self.device)  # waiting for other workers' vectors

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all workers, rank after rank: (n, …) -> (size × n, …), differentiable.

        Every worker's loss sends its gradient back to the worker a row came from, and they are
        summed there; with DDP's average over workers, the mean of the workers' losses is what is
        minimised, as if one worker had held all rows.
        """
        if not self.together:
            return rows
        with self.exchanging:
            return _Gather.apply(rows, self.rank, self.size)

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """(size, …): of every worker the part that it has for this one, rank after rank.

        `parts` (size, …) is what this worker has for each. No gradient passes.
        """
        if not self.together:
            return parts
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        with self.exchanging:
            dist.all_to_all_single(received, parts.contiguous())
        return received

    def share(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as it is called in training: gradients are averaged over the workers."""
        return torch.nn.parallel.DistributedDataParallel(model) if self.together else model

    def gather_messages(self, said: str) -> list[str]:
        """What the workers have to say, each with its host's name; empty sayings are left out."""
        everything = self.gather_objects((socket.gethostname(), said))
        return [f"{host} {text}" for host, text in everything if text]

    def gather_objects(self, mine: Any) -> list[Any]:
        """What every worker has, rank after rank."""
        everything = [mine] * self.size
        if self.together:
            dist.all_gather_object(everything, mine)
        return everything

    def told(self, said: bool) -> bool:
        """What worker 0 says."""
        if not self.together:
            return said
        flag = torch.tensor(said, dtype=torch.uint8, device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag)

    def barrier(self) -> None:
        if self.together:
            dist.barrier()

    def every(self, numbers: list[float]) -> torch.Tensor:
        """The numbers of every worker (size, n), on the CPU."""
        mine = torch.tensor([numbers], device=self.device)
        return (_Gather.apply(mine, self.rank, self.size) if self.together else mine).cpu()

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
        ctx.rank, ctx.size = rank, size
        gathered = rows.new_empty(size * len(rows), *rows.shape[1:])
        _gather_into(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad):
        return own_sum(grad.contiguous(), ctx.rank, ctx.size), None, None


def own_sum(rows: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This worker's share (n, …) of the sum over the workers of rows (size × n, …).

    By reduce-scatter, which sends half of what an all-reduce does; by that where a backend has
    nothing else.
    """
    count = len(rows) // size
    mine = torch.empty_like(rows[:count])
    try:
        _reduce_scatter(mine, rows)
        return mine
    except RuntimeError as error:  # raised on every worker, before anything is sent
        if "support" not in str(error):
            raise
    dist.all_reduce(rows)
    return rows[rank * count : (rank + 1) * count]
