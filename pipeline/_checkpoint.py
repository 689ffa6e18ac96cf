"""Checkpoints: folders that are whole or not there, loaded without pickle.

checkpoint.json names the files with their hashes and is written last.
"""

import torch
from safetensors.torch import load, save

from pipeline import _store
from schemas.checkpoint import Checkpoint

KEPT = 2  # the newest, and the one before until the newest has proved readable


def write(folder: str, name: str, about: dict, model, optimizer, vocabulary: list[str]) -> None:
    """Write checkpoint `name`, then drop the oldest ones (the best one is kept)."""
    uri = _store.join(folder, name)
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{key}": value
        for number, values in state["state"].items()
        for key, value in values.items()
    }
    tensors["rng"] = torch.get_rng_state()
    files = {
        "model.safetensors": save(_contiguous(model.state_dict())),
        "optimizer.safetensors": save(_contiguous(tensors)),
    }
    hashes = {}
    for file, data in files.items():
        _store.write_bytes(_store.join(uri, file), data)
        hashes[file] = _store.sha256(data)
    _store.write_json(_store.join(uri, "vocabulary.json"), vocabulary)
    checkpoint = Checkpoint(
        **about, optimizer={"param_groups": state["param_groups"]}, files=hashes
    )
    _store.write_json(_store.join(uri, "checkpoint.json"), checkpoint.model_dump())
    kept = {*sorted(_store.list_folders(folder))[-KEPT:], name_of_epoch(about["best"]["epoch"])}
    for old in set(_store.list_folders(folder)) - kept:
        _store.remove(_store.join(folder, old))


def name_of_epoch(epoch: float) -> str:
    return f"epoch-{int(epoch):04d}"


def latest(folder: str, fingerprint: str) -> tuple[Checkpoint, dict[str, bytes]] | None:
    """The newest whole checkpoint of this training, with its files; None to start afresh."""
    for name in reversed(_store.list_folders(folder)):
        if found := read(_store.join(folder, name)):
            return found if found[0].fingerprint == fingerprint else None
    return None


def read(uri: str) -> tuple[Checkpoint, dict[str, bytes]] | None:
    """A checkpoint and its files; None where it is torn."""
    try:
        checkpoint = Checkpoint(**_store.read_json(_store.join(uri, "checkpoint.json")))
        files = {name: _store.read_bytes(_store.join(uri, name)) for name in checkpoint.files}
    except (OSError, ValueError):
        return None
    whole = all(_store.sha256(files[name]) == digest for name, digest in checkpoint.files.items())
    return (checkpoint, files) if whole else None


def restore(found: tuple[Checkpoint, dict[str, bytes]], model, optimizer) -> None:
    """Put weights, optimizer state and random state back."""
    checkpoint, files = found
    model.load_state_dict(load(files["model.safetensors"]))
    tensors = load(files["optimizer.safetensors"])
    torch.set_rng_state(tensors.pop("rng"))
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, **checkpoint.optimizer})


def _contiguous(tensors: dict) -> dict:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
