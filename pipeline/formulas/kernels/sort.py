"""Sorting rows. On a CPU it goes through numpy's vectorised sort, 4 to 30 times as fast as torch's.

Legend of the shape suffixes: Q rows, N entries of a row.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from pipeline.formulas.floats import has_numba, turned


def sort_rows_(x_QN: Tensor, *, runs: bool = False) -> Tensor:
    """Sorts every row of a contiguous x_QN upwards, in place, and returns it; no gradient passes.

    `runs` says that each row is two sorted halves already: long ones are then merged, in time
    linear in their length.

    >>> sort_rows_(torch.tensor([[2.0, 3.0, 1.0]]))
    tensor([[1., 2., 3.]])
    """
    if _numpy_can(x_QN):
        x_QN.numpy().sort(axis=-1, kind="stable" if runs and x_QN.shape[1] > 512 else None)
        return x_QN
    return x_QN.copy_(x_QN.sort(dim=-1).values)


def order_of_rows(x_QN: Tensor, *, descending: bool = False) -> Tensor:
    """order_QN: the places of a row's entries from smallest to largest, of equals the left first.

    >>> order_of_rows(torch.tensor([[2.0, 3.0, 1.0, 3.0]]), descending=True)
    tensor([[1, 3, 0, 2]])
    """
    x_QN = x_QN.detach()
    n = x_QN.shape[1]
    if not _numpy_can(x_QN) or not x_QN.is_floating_point() or n >= 2**29:
        return x_QN.argsort(dim=-1, descending=descending, stable=True)
    x_QN = 0 - x_QN if descending else x_QN + 0  # and no -0
    if n >= 256 and (fast := compiled()):
        order_QN: Tensor = fast.order_of_rows(_integers_like(x_QN))
        return order_QN
    # One integer holds the value above the place: sorting it is a stable argsort. The place takes
    # the last bits of a double, which are all 0 if it was a float.
    last = 2 ** max(0, n - 1).bit_length() - 1
    key_QN = _integers_like(x_QN.double()).bitwise_and_(~last)
    order_QN = sort_rows_(key_QN.bitwise_or_(torch.arange(n))).bitwise_and_(last)
    if x_QN.dtype == torch.float64:
        sorted_QN = x_QN.gather(1, order_QN)
        if not (sorted_QN[:, 1:] >= sorted_QN[:, :-1]).all():  # values that differ in those bits
            return x_QN.argsort(dim=-1, stable=True)
    return order_QN


def _integers_like(x_QN: Tensor) -> Tensor:
    """Integers in the order of these floats."""
    if x_QN.dtype == torch.float32:
        return turned(x_QN.view(torch.int32))
    return turned(x_QN.view(torch.int64), last=63)


@functools.cache
def compiled() -> ModuleType | None:
    """The module of passes that numba compiles, or None where it is not installed."""
    return importlib.import_module("pipeline.formulas.kernels.compiled") if has_numba() else None


def largest(x_QN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, places) of each row's `count` largest entries, in no order.

    Of a long row the best groups of 8 by their largest entry come first: no other can hold one.

    >>> largest(torch.tensor([[2.0, 3.0, 1.0, 3.5]]), 1)[1]
    tensor([[3]])
    """
    groups = x_QN.shape[1] // 8
    if groups < 4 * count:
        return x_QN.topk(count, sorted=False)
    # Strided groups, their largest entries, and the members of the best groups.
    tops_QG = x_QN[:, : 8 * groups].unflatten(1, (8, groups)).amax(1)
    best_Q1C = tops_QG.topk(count, sorted=False).indices[:, None]
    members_81 = groups * torch.arange(8, device=x_QN.device)[:, None]
    # And what is left over of the row, in no group.
    rest = torch.arange(8 * groups, x_QN.shape[1], device=x_QN.device).expand(len(x_QN), -1)
    places = torch.cat([(best_Q1C + members_81).flatten(1), rest], 1)
    values, chosen = x_QN.gather(1, places).topk(count, sorted=False)
    return values, places.gather(1, chosen)


def _numpy_can(x_QN: Tensor) -> bool:
    known = (torch.float32, torch.float64, torch.int64, torch.int32)
    if x_QN.device.type != "cpu" or x_QN.dtype not in known:
        return False
    try:
        x_QN.numpy()
    except RuntimeError:  # torch was installed without numpy
        return False
    return True
