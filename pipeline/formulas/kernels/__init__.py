"""The inner loops of losses and metrics: smooth ranks, sorting, pairs; private."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Mask = Tensor | None  # True for candidates in the list; None: all are
Function = Callable[..., Tensor]  # a loss or a metric, of scores, target and settings
Settings = dict[str, Any]  # of a loss
Value = tuple[Tensor, Tensor | None]  # loss_R, and gradient_RN where it is wanted
Kernel = Callable[..., Value]
