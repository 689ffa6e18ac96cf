"""What of a tower is trained, and how fast: the modes of `model.tune_image` and `tune_text`.

A tower in two parts, like a pretrained one, has `features(x)`, the part that came with weights, and
`head(features)`, what follows it; its `new` names the modules that came without. Frozen, all is
fixed but those. Any other tower is frozen whole. A frozen tower's fixed part runs as in evaluation,
so that an input has one vector: `FrozenPart` is that part, and training may keep what it gives.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.tuning import adapters, patches
from pipeline.models.tuning.blocks import blocks_of
from schemas.settings import ModelSettings, TuneSettings

RANK = 8  # of low-rank updates, unless told otherwise


@dataclass(frozen=True)
class Tuned:
    """How a tower is trained."""

    mode: str = "full"
    lr: float | None = None  # instead of `train.lr`
    scales: dict[str, float] = field(default_factory=dict)  # of the rate, by parameter, where not 1
    still: tuple[nn.Module, ...] = ()  # modules that run as in evaluation while others are trained
    draws: bool = False  # whether the tower's input is drawn anew each step (patch dropout)

    def lr_scale(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied with."""
        return self.scales.get(name, 1.0)


def tune(tower: nn.Module, side: str, settings: ModelSettings) -> Tuned:
    """Freeze what is not to be trained of the `side` (image or text), add what is.

    Raises ValueError, with the setting's name, for what the tower cannot do.
    """
    how: TuneSettings = getattr(settings, f"tune_{side}")
    kind = getattr(settings, side)
    before = how.mode is None and kind == "pretrained"  # settings of both towers alike
    mode = how.mode or "full"
    if before:
        mode = "lora" if settings.lora_rank else "last" if settings.freeze else "full"
    try:
        decay = how.layer_decay or (settings.layer_decay if kind == "pretrained" else 1.0)
        depths, last = _depths(tower)
        if decay < 1 and how.layer_decay and last == 1:
            raise ValueError(f"layer_decay {decay}: the tower is not made of blocks; set it to 1")
        still: list[nn.Module] = []
        if mode == "frozen":
            still = _freeze(tower)
        elif mode == "last":
            still = _train_last(tower, settings.freeze if before else None, how.layers)
        elif mode == "lora":
            _add_updates(tower, settings if before else None, how)
            depths, last = _depths(tower)
        if how.frozen_batch_norm:
            still += _norms(tower)
        if how.patch_dropout:
            patches.drop(getattr(tower, "encoder", tower), how.patch_dropout)
    except ValueError as error:
        raise ValueError(f"model.tune_{side} of the {kind} tower: {error}") from error
    scales = {name: decay ** (last - depth) for name, depth in depths.items() if decay < 1}
    return Tuned(mode, how.lr, scales, tuple(still), bool(how.patch_dropout))


def _depths(tower: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter by name, and the greatest one.

    0 before the blocks, 1 … n in them, n + 1 after them; 1 for all of a tower without blocks.
    Before and after is the order in which the tower's modules were made.
    """
    start, blocks = blocks_of(tower)
    last, depths, met = len(blocks) + 1, {}, not blocks
    for name, _ in tower.named_parameters():
        inside = bool(blocks) and name.startswith(f"{start}.")
        met = met or inside
        own = 1 + int(name.removeprefix(f"{start}.").split(".")[0]) if inside else 0
        depths[name] = own or (last if met else 0)
    return depths, last


def new_in(tower: nn.Module) -> list[nn.Module]:
    """The modules of a tower that came without weights, beside others that came with some."""
    return [tower.get_submodule(name) for name in getattr(tower, "new", ())]


def _freeze(tower: nn.Module) -> list[nn.Module]:
    """Nothing is trained but what is new; the modules that run as in evaluation."""
    for parameter in tower.parameters():
        parameter.requires_grad = False
    free = {id(inner) for module in new_in(tower) for inner in module.modules()}
    for module in new_in(tower):
        for parameter in module.parameters():
            parameter.requires_grad = True
    return [module for module in tower.modules() if id(module) not in free]


def _train_last(tower: nn.Module, first: int | None, layers: int) -> list[nn.Module]:
    """The last blocks are trained and what follows them, or all but the `first` ones."""
    depths, last = _depths(tower)
    if not first and last == 1:
        raise ValueError("it is not made of blocks, of which the last could be trained; use full")
    if first is None and layers >= last:
        raise ValueError(f"layers {layers}, and it has {last - 1} blocks; give fewer, or mode full")
    frozen = last - 1 - layers if first is None else first
    for name, parameter in tower.named_parameters():
        parameter.requires_grad = depths[name] > frozen
    if first is not None:  # `model.freeze` leaves them in training mode
        return []
    blocks = blocks_of(tower)[1][:frozen]
    return [inner for block in blocks for inner in block.modules()]


def _add_updates(tower: nn.Module, before: ModelSettings | None, how: TuneSettings) -> None:
    """Low-rank updates are trained, and the projection."""
    known = adapters.OF_BEFORE if before else adapters.ATTENTION
    targets = list(how.lora_targets) or adapters.attention_of(tower, known)
    if not targets:
        layers = ", ".join(known)
        raise ValueError(
            f"mode lora: it has none of the layers of attention ({layers}); name some of its own "
            "by lora_targets, or use full"
        )
    rank = before.lora_rank if before else how.lora_rank or RANK
    adapters.add(tower, rank, how.lora_alpha or 2 * rank, targets)
    project = getattr(tower, "project", None)
    for module in new_in(tower) or ([project] if isinstance(project, nn.Module) else []):
        for name, parameter in module.named_parameters():
            parameter.requires_grad = "base_layer" not in name


def _norms(tower: nn.Module) -> list[nn.Module]:
    norms: list[nn.Module] = [m for m in tower.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        raise ValueError("frozen_batch_norm: it has no batch norm; set it to false")
    return norms


class FrozenPart:
    """The part of a frozen tower that gives an input the same vector at every step.

    That is `features` of a tower in two parts of which the second is trained, else the whole tower.
    What it gives is what `TwoTower.forward` takes for a side that is `given`.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.whole = not any(p.requires_grad for p in tower.parameters())

    @staticmethod
    def of(tower: nn.Module, tuned: Tuned) -> "FrozenPart | None":
        """None where the tower is not frozen, or its input is drawn."""
        if tuned.mode != "frozen" or tuned.draws:
            return None
        part = FrozenPart(tower)
        parted = hasattr(tower, "features") and hasattr(tower, "head")
        return part if part.whole or parted else None

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        """(B, F) of a batch."""
        return self.tower(*given) if self.whole else self.tower.features(*given)  # type: ignore[operator]

    def head(self, vectors: torch.Tensor) -> torch.Tensor:
        """(B, dim), not of unit norm, of what the part gave."""
        return vectors if self.whole else self.tower.head(vectors)  # type: ignore[operator]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights and buffers by name."""
        new = () if self.whole else tuple(f"{name}." for name in getattr(self.tower, "new", ()))
        own = self.tower.state_dict().items()
        return {name: value for name, value in own if not name.startswith(new)}
