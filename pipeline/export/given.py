"""A finished model as people name it: a run folder, its own folder, or a checkpoint's."""

from dataclasses import dataclass, replace

from safetensors.torch import load

from pipeline.errors import InputError, did_you_mean
from pipeline.storage import store
from pipeline.storage.run_folder import FOLDERS, INDEX, RunFolder
from pipeline.training.saved_model import SavedModel, load_model

WEIGHTS, CHECKPOINT = "model.safetensors", "checkpoint.json"


@dataclass(frozen=True)
class Given:
    """Where a model lies. `root` is its run folder's, None where it is kept without one."""

    folder: str  # of stage 5, or one that MLflow kept
    name: str
    root: str | None = None
    checkpoint: str | None = None  # whose weights are meant instead of those handed on

    def load(self) -> SavedModel:
        """The model, in evaluation mode. Texts are read as they are: prompts are no weights."""
        model = load_model(self.folder, prompts=())
        if self.checkpoint is None:
            return model
        weights = load(store.read_bytes(store.join(self.checkpoint, WEIGHTS)))
        try:  # what was frozen is in no checkpoint
            found = model.towers.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # other sizes
            said = f"{self.checkpoint} is of other towers than {self.folder}"
            raise InputError(f"{said} ({str(error).splitlines()[-1].strip()})") from error
        if found.unexpected_keys:
            raise InputError(
                f"{self.checkpoint} holds {len(found.unexpected_keys)} tensors that the model in "
                f"{self.folder} does not have, such as {found.unexpected_keys[0]}"
            )
        return replace(model, towers=model.towers.eval())


def given(name: str, only: str | None = None) -> Given:
    """The model that RUN, RUN:MODEL or a folder names; `only` picks one of several in RUN."""
    before, colon, after = name.rpartition(":")
    whole = not colon or "/" in after
    uri = store.absolute(name if whole else before)
    only = only if whole else after
    if store.exists(store.join(uri, CHECKPOINT)):
        above = uri.rpartition("/checkpoints/")[0]
        if not above or not store.exists(store.join(above, INDEX)):
            raise InputError(
                f"{uri} is a checkpoint of a training that has not finished, or lies apart from "
                "it; how its towers are built stands in the finished model's folder"
            )
        return replace(_trained(above), checkpoint=uri)
    if store.exists(store.join(uri, WEIGHTS)) and store.exists(store.join(uri, INDEX)):
        return _trained(uri)
    names = store.list_folders(store.join(uri, FOLDERS["train"]))
    finished = [n for n in names if RunFolder(uri).known("train", n)]
    if not finished:
        raise InputError(
            f"no trained model in {uri}; name a run folder (RUN or RUN:MODEL), a model's folder "
            "(RUN/5-model/MODEL), a checkpoint's, or what MLflow calls it (models:/NAME@best)"
        )
    if only is None and len(finished) > 1:
        raise InputError(f"{uri} holds {', '.join(finished)}; write {name}:{finished[0]}")
    only = only or finished[0]
    if only not in finished:
        raise InputError(f"no trained model {only!r} in {uri}{did_you_mean(only, finished)}")
    return Given(RunFolder(uri).folder("train", only), only, uri)


def _trained(folder: str) -> Given:
    """The model of such a folder, and the run folder above it where there is one."""
    above, _, name = folder.rstrip("/").rpartition("/")
    root, _, stage = above.rpartition("/")
    inside = stage == FOLDERS["train"]
    return Given(folder, name, root if inside else None)
