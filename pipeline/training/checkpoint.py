"""Checkpoints: folders that are whole or not there, loaded without pickle.

checkpoint.json names the files with their hashes and is written last. A `Writer` writes them in the
background, from copies that it took at the step.
"""

import hashlib
import threading
from typing import Any

import torch
from safetensors.torch import load, save
from torch.distributed.checkpoint import state_dict

from pipeline.storage import store
from pipeline.training.distributed import ProcessGroup
from schemas.checkpoint import Checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]  # by file, then by name

WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
KEPT = 2  # the newest, and the one before until the newest has proved readable
OWN = ("fused", "foreach", "capturable")  # how an optimizer computes here, whatever it did before


class Writer:
    """Writes the checkpoints of a folder, one at a time, while training goes on.

    Every worker has one and calls it alike; worker 0's writes.
    """

    def __init__(self, folder: str, world: ProcessGroup, epochs: int = 0):
        self.folder, self.world = folder, world
        self.epochs = epochs  # the last so many stay
        self._copies: Tensors = {}  # on worker 0; their memory is used again by the next one
        self._begun = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, about: dict, tensors: Tensors, vocabulary: list | dict) -> None:
        """Copy the tensors to host memory and have them written; what was begun before is done.

        Returns when later steps can no longer change what is written. Off a GPU the copies are
        made in the order of its work, and only the writing waits for them.
        """
        self.wait()
        self._begun = True
        self._copies = whole(tensors, self.world.rank == 0, self._copies)
        if self.world.rank == 0:
            copied = _now(self.world.device)
            self._thread = threading.Thread(
                target=self._write, args=(copied, about, vocabulary), name="checkpoint"
            )
            self._thread.start()

    def _write(self, copied, about: dict, vocabulary: list | dict) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            store.write_json(store.join(self.folder, "records.json"), about["records"])
            write(self.folder, about, self._copies, vocabulary, self.epochs)
        except BaseException as error:  # raised where training waits for the checkpoint
            self._error = error

    def done(self) -> bool:
        """Whether nothing is being written; all workers hear the same."""
        return self.world.told(self._thread is None or not self._thread.is_alive())

    def wait(self) -> None:
        """Return when what was begun is durable; raises, on all workers, where it cannot be."""
        if not self._begun:
            return
        problem, self._begun = self._ended(), False
        said = self.world.gather_messages(f"{problem}" if problem else "")
        if problem:
            raise problem
        if said:
            raise OSError(f"a checkpoint could not be written: {said[0]}")

    def give_up(self, reason: BaseException) -> None:
        """The training ends for another reason: what is being written is still written whole."""
        if problem := self._ended():
            reason.add_note(f"and a checkpoint could not be written: {problem}")

    def _ended(self) -> BaseException | None:
        """Wait for the thread; what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
        self._thread, problem, self._error = None, self._error, None
        return problem


def whole(tensors: Tensors, keep: bool, into: Tensors | None = None) -> Tensors:
    """Copies in host memory, whole where workers hold shares; empty where not to `keep` any.

    Every worker calls it. `into` is an earlier answer, whose memory is used again. Copies from a
    GPU (to pinned memory) may still be on their way.
    """
    into, copies = into or {}, {}
    for file, values in tensors.items():
        kept = copies[file] = {}
        for name, value in values.items():
            full = _full(value)
            if not keep:
                continue
            copy = into.get(file, {}).get(name)
            if copy is None or (copy.shape, copy.dtype) != (full.shape, full.dtype):
                copy = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
            kept[name] = copy.copy_(full, non_blocking=True)
    return copies if keep else {}


def _full(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _now(device: torch.device) -> Any:
    """What can be waited for until the device has done all it was given so far; None: it has."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def write(
    folder: str, about: dict, tensors: Tensors, vocabulary: list | dict, epochs: int = 0
) -> None:
    """Write the checkpoint of a step, then drop the oldest ones.

    The best one is kept, and those of the ends of the last `epochs`. `tensors` holds those of each
    file by name: model, optimizer, and raw with averaged weights.
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
    ends = [name_of(r["step"]) for r in about["records"] if r.get("epoch")]
    kept = {*store.list_folders(folder)[-KEPT:], name_of(about["best"]["step"])}
    kept |= {*ends[-epochs:]} if epochs else set()
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
    return checkpoint, {n.removesuffix(".safetensors"): _loaded(d) for n, d in files.items()}


def _loaded(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file, sorted by name, as it gives them in another order in every process.

    Workers are dealt their shares of them one by one, all in the same order.
    """
    return dict(sorted(load(data).items()))


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are not trained, by name: no checkpoint holds them."""
    return {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}


def identity(tensors: dict[str, torch.Tensor]) -> str | None:
    """16 hex digits for these names and values; None for none. Every worker calls it."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        full = _full(value).cpu().contiguous()
        digest.update(f"{name} {full.dtype} {tuple(full.shape)}".encode())
        digest.update(full.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16] if tensors else None


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and buffers that training changes, by name; of sharded ones this worker's share.

    They are the very tensors of the model. Every worker calls it.
    """
    weights: dict[str, Any] = state_dict.get_model_state_dict(model)
    left_out = frozen(model)
    return {name: value for name, value in weights.items() if name not in left_out}


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict]:
    """What a checkpoint keeps of both: tensors by file, and the rest. Every worker calls it.

    They are those that training changes; of sharded ones this worker's share.
    """
    weights = trained(model)
    state: dict[str, Any] = state_dict.get_optimizer_state_dict(model, optimizer)
    slots = {f"{n}/{k}": v for n, kept in state.get("state", {}).items() for k, v in kept.items()}
    files = {"model": weights, "optimizer": slots}
    return files, {"param_groups": state.get("param_groups", [])}


def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what `state_of` gave, and frozen ones where they are given. Every worker calls it.

    Raises KeyError where one that is trained is missing, or one is given that is not there.
    """
    own = set(state_dict.get_model_state_dict(model))
    needed = own - frozen(model).keys()
    if strangers := (needed - weights.keys()) | (weights.keys() - own):
        raise KeyError(f"{len(strangers)} tensors, such as {min(strangers)}")
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
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = [  # a fused optimizer counts its steps on the device
        {**then, **{k: now[k] for k in OWN if k in now}}
        for then, now in zip(rest["param_groups"], own, strict=True)
    ]
    everything: dict[str, Any] = {"state": state, "param_groups": groups}
    state_dict.set_optimizer_state_dict(model, optimizer, everything, options=WHOLE)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
