"""Sorting rows. On a CPU it goes through numpy's vectorised sort, 4 to 30 times as fast as torch's.

Legend of the shape suffixes: Q rows, N entries of a row.
"""

import torch


def sort_rows_(x_QN):
    """Sorts every row of a contiguous x_QN upwards, in place, and returns it; no gradient passes.

    >>> sort_rows_(torch.tensor([[2.0, 3.0, 1.0]]))
    tensor([[1., 2., 3.]])
    """
    if _numpy_can(x_QN):
        x_QN.numpy().sort(axis=-1)
        return x_QN
    return x_QN.copy_(x_QN.sort(dim=-1).values)


def order_of_rows(x_QN, *, descending=False):
    """order_QN: the places of each row's entries from smallest to largest; of equal ones, the left one first.

    >>> order_of_rows(torch.tensor([[2.0, 3.0, 1.0, 3.0]]), descending=True)
    tensor([[1, 3, 0, 2]])
    """
    x_QN = x_QN.detach()
    if not _numpy_can(x_QN) or x_QN.dtype != torch.float32 or x_QN.shape[1] >= 2**31:
        return x_QN.argsort(dim=-1, descending=descending, stable=True)
    # One integer holds the value (as bits that sort like the float) above the place: sorting it is a stable argsort.
    bits_QN = (-x_QN if descending else x_QN + 0).contiguous().view(torch.int32)
    bits_QN = bits_QN ^ ((bits_QN >> 31) & 0x7FFFFFFF)
    key_QN = bits_QN.long().mul_(2**32).add_(torch.arange(x_QN.shape[1]))
    key_QN.numpy().sort(axis=-1)
    return key_QN.bitwise_and_(2**32 - 1)


def _numpy_can(x_QN):
    if x_QN.device.type != "cpu" or x_QN.dtype not in (torch.float32, torch.float64, torch.int64, torch.int32):
        return False
    try:
        x_QN.numpy()
    except RuntimeError:  # torch was installed without numpy
        return False
    return True
