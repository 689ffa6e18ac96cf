"""What would hold up a GPU, seen on a processor: reading a tensor's values on the host."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read values to know what to do or how large their result is.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"}
READING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
# Methods that hand values to Python, some of them without an operator on a processor.
HANDING = {"tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__"}
HANDING |= {"__array__", "__iter__"}


class HostWaits:
    """While it is entered, `found` gets every operation that waits for a device.

    `host` are tensors that stay on the host where the others are on a device.
    """

    def __init__(self, *host: torch.Tensor):
        self.found: list[str] = []
        self.host = {id(tensor) for tensor in host}
        self.modes = _Operators(self), _Methods(self)

    def __enter__(self) -> "HostWaits":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            at is not None and at.dtype in (torch.bool, torch.uint8) for at in args[1]
        )
        if name in READING or masked:
            self.waits.found.append(f"aten::{name}")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        of_device = bool(args) and id(args[0]) not in self.waits.host
        if name in HANDING and of_device and isinstance(args[0], torch.Tensor):
            self.waits.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))
