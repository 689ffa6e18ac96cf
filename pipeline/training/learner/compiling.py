"""Whether the towers are compiled: where it pays, and where there is a compiler."""

import logging

import torch

from pipeline.models import TwoTower
from pipeline.training.distributed import ProcessGroup
from schemas.settings import TrainSettings

PAYS = 2_000  # steps: compiling takes about a minute, and saves tens of milliseconds a step
LOG = logging.getLogger(__name__)


def compile_towers(
    model: TwoTower, settings: TrainSettings, world: ProcessGroup, steps: int
) -> str:
    """Have torch compile both towers at their first call, if that was asked for or pays.

    A sentence where nothing can be compiled, else "". Where a compiler fails on a part of a tower
    torch says so; either way training goes on. All workers do the same.
    """
    if not wanted(settings, world.device, steps):
        return ""
    if problems := world.gather_messages(_problem(world.device)):
        if world.rank == 0:
            LOG.warning("the towers are trained without being compiled: %s", problems[0])
        return problems[0]
    torch._dynamo.config.suppress_errors = True  # a part that is not understood runs as it is
    model.image.compile()
    model.text.compile()
    return ""


def wanted(settings: TrainSettings, device: torch.device, steps: int) -> bool:
    """Whether to compile for a training of so many steps."""
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" and settings.sharding == "ddp" and steps >= PAYS


def _problem(device: torch.device) -> str:
    """Why nothing can be compiled for the device; empty where it can."""
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(_trial)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, of the C compiler behind them
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"torch.compile fails ({lines[0] if lines else type(error).__name__})"
    return ""


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
