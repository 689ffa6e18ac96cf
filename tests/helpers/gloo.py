"""Workers of a test: processes that meet in a gloo group."""

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.helpers import forked


def together(size: int, work: Callable[..., None], *given) -> None:
    """Call `work(rank, size, *given)` in `size` processes at once."""
    forked.context()
    multiprocessing.start_processes(work, (size, *given), size, start_method="forkserver")


def meet(rank: int, size: int, folder: str, work: Callable[[], None]) -> None:
    """Do the work as one of `size` workers that meet in the folder.

    What it made is gone before the group is: a model under DDP that lets go of the group last does
    so holding Python's lock, and waits for a thread that waits for the lock.
    """
    torch.set_num_threads(1)
    if size == 1:
        return work()
    gc.freeze()  # what was imported before the fork: no collection goes through it, or copies it
    dist.init_process_group("gloo", f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    work()
    gc.collect()
    return dist.destroy_process_group()
