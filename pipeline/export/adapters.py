"""Low-rank updates merged into the weights that they are of."""

import copy
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def merged(model: Model) -> Model:
    """A copy of the model without adapters; its vectors are the same to rounding."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if not (hasattr(module, "lora_A") and hasattr(module, "get_base_layer")):
            continue
        layer: Any = module
        layer.merge()
        above, _, own = name.rpartition(".")
        setattr(plain.get_submodule(above), own, layer.get_base_layer())
    return plain
