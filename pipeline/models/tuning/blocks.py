"""What a tower is made of, one after the other."""

from typing import Any

from torch import nn


def blocks_of(tower: nn.Module) -> tuple[str, list[nn.Module]]:
    """A tower's blocks in order, with the name of their list: its longest list of modules.

    Where it has none, its longest sequence of modules. ("", []) where it has neither. Lists and
    sequences of single layers are none.
    """
    kind: Any
    for kind in (nn.ModuleList, nn.Sequential):
        lists = [
            (name, list(module))
            for name, module in tower.named_modules()
            if isinstance(module, kind) and len(module) and all(any(m.children()) for m in module)
        ]
        if lists:
            return max(lists, key=lambda found: len(found[1]))
    return "", []
