"""Low-rank updates of a tower's layers (LoRA, arXiv 2106.09685), and their merging."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

# Attention's projections, by the names that Hugging Face's models give them.
OF_BEFORE = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin")
ATTENTION = (*OF_BEFORE, "k_lin", "v_lin", "qkv")
TAKES = (nn.Linear, nn.Embedding, nn.Conv2d)  # layers that can have an update
Model = TypeVar("Model", bound=nn.Module)


def add(tower: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    """Put updates into the layers whose names end in a target; the names of those layers.

    All that was there is not trained afterwards. An update counts alpha / rank, and is 0 at first.
    Raises ValueError where a target is no layer's name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("low-rank updates need peft; install halftone-itr[lora]") from error
    layers = [name for name, module in tower.named_modules() if isinstance(module, TAKES)]
    found = {target: [n for n in layers if f".{n}".endswith(f".{target}")] for target in targets}
    if missed := [target for target in targets if not found[target]]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise ValueError(f"no layer is called {missed[0]}; its layers are {known or 'none'}")
    for parameter in tower.parameters():
        parameter.requires_grad = False
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets))  # type: ignore[arg-type]
    inject_adapter_in_model(config, tower)
    return sorted(name for names in found.values() for name in names)


def attention_of(tower: nn.Module, names: Sequence[str] = ATTENTION) -> list[str]:
    """Those of the names that linear layers of the tower have."""
    linear = [n for n, module in tower.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear} & set(names))


def merged(model: Model) -> Model:
    """A copy of the model without adapters: their updates are added to the weights they are of.

    It gives the same vectors to rounding (1e-6), has the parameters and names of a model that never
    had any, and needs no peft. The model itself stays as it is; one without adapters is copied.
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if not (hasattr(module, "lora_A") and hasattr(module, "get_base_layer")):
            continue
        layer: Any = module
        layer.merge()
        above, _, own = name.rpartition(".")
        setattr(plain.get_submodule(above), own, layer.get_base_layer())
    return plain
