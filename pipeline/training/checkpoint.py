"""Checkpoints: folders that are whole or not there, loaded without pickle.

checkpoint.json names the files with their hashes and is written last.
"""

from typing import Any

import torch
from safetensors.torch import load, save
from torch.distributed.checkpoint import state_dict

from pipeline.storage import store
from schemas.checkpoint import Checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]  # by file, then by name

WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
KEPT = 2  # the newest, and the one before until the newest has proved readable


def write(folder: str, about: dict, tensors: Tensors, vocabulary: list | dict) -> None:
    """Write the checkpoint of a step, then drop the oldest ones (the best one is kept).

    `tensors` holds those of each file by name: model, optimizer, and raw with averaged weights.
    """
    uri = store.join(folder, name_of(about["step"]))
    hashes = {}
    for name, values in tensors.items():
        data = save({key: value.contiguous() for key, value in values.items()})
        hashes[f"{name}.safetensors"] = store.sha256(data)
        store.write_bytes(store.join(uri, f"{name}.safetensors"), data)
    store.write_json(store.join(uri, "vocabulary.json"), vocabulary)
    checkpoint = Checkpoint(**about, files=hashes)
    store.write_json(store.join(uri, "checkpoint.json"), checkpoint.model_dump())
    kept = {*store.list_folders(folder)[-KEPT:], name_of(about["best"]["step"])}
    for old in set(store.list_folders(folder)) - kept:
        store.remove(store.join(folder, old))


def name_of(step: float) -> str:
    return f"step-{int(step):08d}"


def latest(folder: str) -> tuple[tuple[Checkpoint, Tensors] | None, list[str]]:
    """The newest whole checkpoint or None, and the names of torn ones that were passed over."""
    torn = []
    for name in reversed(store.list_folders(folder)):
        if found := read(store.join(folder, name)):
            return found, torn
        torn.append(name)
    return None, torn


def read(uri: str) -> tuple[Checkpoint, Tensors] | None:
    """A checkpoint and its tensors by file; None where it is torn."""
    try:
        checkpoint = Checkpoint(**store.read_json(store.join(uri, "checkpoint.json")))
        files = {name: store.read_bytes(store.join(uri, name)) for name in checkpoint.files}
    except (OSError, ValueError):
        return None
    if any(store.sha256(files[name]) != digest for name, digest in checkpoint.files.items()):
        return None
    return checkpoint, {n.removesuffix(".safetensors"): load(data) for n, data in files.items()}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors, whole, by name. Every worker calls it."""
    weights: dict[str, Any] = state_dict.get_model_state_dict(model, options=WHOLE)
    return weights


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict]:
    """What a checkpoint keeps of both: tensors by file, and the rest. Every worker calls it."""
    state: dict[str, Any] = state_dict.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    slots = {f"{n}/{k}": v for n, kept in state.get("state", {}).items() for k, v in kept.items()}
    files = {"model": weights_of(model), "optimizer": slots}
    return files, {"param_groups": state.get("param_groups", [])}


def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what `weights_of` gave. Every worker calls it."""
    state_dict.set_model_state_dict(model, dict(weights), options=WHOLE)


def put_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, files: Tensors, rest: dict
) -> None:
    """Put back what `state_of` gave; rates and decay stay the optimizer's own. Every worker."""
    put_weights(model, files["model"])
    state: Tensors = {}
    for key, value in files["optimizer"].items():
        name, _, slot = key.rpartition("/")
        state.setdefault(name, {})[slot] = value
    whole: dict[str, Any] = {"state": state, "param_groups": rest["param_groups"]}
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state_dict.set_optimizer_state_dict(model, optimizer, whole, options=WHOLE)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
