"""What would hold up a GPU, seen on a processor: reading a tensor's values on the host."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.paths import ROOT

# Operators that read values to know what to do or how large their result is.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"}
READING |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
# Methods that hand values to Python, some of them without an operator on a processor.
HANDING = {"tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__"}
HANDING |= {"__array__"}


class HostWaits:
    """While it is entered, `found` gets every operation that waits for a device.

    `host` are tensors that stay on the host where the others are on a device; so does what is made
    of them alone.
    """

    def __init__(self, *host: torch.Tensor):
        self.found: list[str] = []
        self.host = {place(tensor): tensor for tensor in host}  # kept: a place is used again
        self.modes = _Operators(self), _Methods(self)

    def on_host(self, *given) -> bool:
        """Whether all tensors among the arguments are on the host, and there are some."""
        tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        return bool(tensors) and all(place(tensor) in self.host for tensor in tensors)

    def tell(self, what: str) -> None:
        """Once a place: what waits, and where in the project's own code it is asked for."""
        frames = traceback.extract_stack()
        own = [f for f in frames if f.filename.startswith(f"{ROOT}/pipeline")] or frames
        where = own[-1]
        said = f"{what} in {where.filename.removeprefix(f'{ROOT}/')}:{where.lineno} {where.line}"
        if said not in self.found:
            self.found.append(said)

    def __enter__(self) -> "HostWaits":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if self.waits.on_host(args, kwargs):
            new = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
            self.waits.host |= {place(tensor): tensor for tensor in new}
            return made
        name = func.overloadpacket.__name__
        if name == "_pack_padded_sequence":  # the sizes that recurrent layers go by
            self.waits.host[place(made[1])] = made[1]
        masked = name in ("index", "index_put", "index_put_") and any(
            at is not None and at.dtype in (torch.bool, torch.uint8) for at in args[1]
        )
        if name in READING or masked:
            self.waits.tell(f"aten::{name}")
        return made


class _Methods(TorchFunctionMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        of_tensor = bool(args) and isinstance(args[0], torch.Tensor)
        if name in HANDING and of_tensor and not self.waits.on_host(args[0]):
            self.waits.tell(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))
