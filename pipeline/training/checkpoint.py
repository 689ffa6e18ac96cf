"""Checkpoints: folders that are whole or not there, loaded without pickle.

checkpoint.json names the files with their hashes and is written last.
"""

from safetensors.torch import load, save

from pipeline.storage import store
from schemas.checkpoint import Checkpoint

KEPT = 2  # the newest, and the one before until the newest has proved readable


def write(folder: str, about: dict, tensors: dict[str, dict], vocabulary: list | dict) -> None:
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


def latest(folder: str) -> tuple[tuple | None, list[str]]:
    """The newest whole checkpoint as `read` gives it, or None.

    With the names of torn ones that were passed over. Its fingerprint says whose it is.
    """
    torn = []
    for name in reversed(store.list_folders(folder)):
        if found := read(store.join(folder, name)):
            return found, torn
        torn.append(name)
    return None, torn


def read(uri: str) -> tuple[Checkpoint, dict[str, dict]] | None:
    """A checkpoint and its tensors by file; None where it is torn."""
    try:
        checkpoint = Checkpoint(**store.read_json(store.join(uri, "checkpoint.json")))
        files = {name: store.read_bytes(store.join(uri, name)) for name in checkpoint.files}
    except (OSError, ValueError):
        return None
    if any(store.sha256(files[name]) != digest for name, digest in checkpoint.files.items()):
        return None
    return checkpoint, {n.removesuffix(".safetensors"): load(data) for n, data in files.items()}
