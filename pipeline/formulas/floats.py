"""What sorting and searching share: floats as integers in their order, and whether numba is there.

Whatever is compiled by numba has a twin in torch, so numba may be missing.
"""

import functools
from importlib.util import find_spec
from typing import TypeVar

from torch import Tensor

Bits = TypeVar("Bits", Tensor, int)


@functools.cache
def has_numba() -> bool:
    """Whether passes can be compiled."""
    return find_spec("numba") is not None


def turned(bits: Bits, last: int = 31) -> Bits:
    """Integers in the order of floats, from the bits of those, and the bits from the integers.

    The bits of a float rise with it; of negative ones all but the sign, bit `last`, are turned
    over. For tensors, and compiled for numbers.
    """
    return bits ^ ((bits >> last) & ((1 << last) - 1))
