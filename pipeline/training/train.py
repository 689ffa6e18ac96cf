"""Stage 5: a two-tower model is trained on the shards.

`fit` knows torch.distributed and nothing of what started it: it runs bare, under torchrun and
under Ray Train alike.
"""

from collections.abc import Callable

from safetensors.torch import load

from pipeline import models
from pipeline.labels import embed, label
from pipeline.models import TwoTower, Vocabulary
from pipeline.storage import plan as _plan
from pipeline.storage import store as _store
from pipeline.storage.plan import Piece, Plan
from pipeline.training.distributed import World
from pipeline.training.objective import check
from pipeline.training.trainer import Report, Training, needs_embeddings, needs_labels
from schemas.settings import Recipe

# Settings of how a training is run: with others it is the same training.
HOW = {
    *("workers", "min_workers", "sharding", "compile", "decode_threads"),
    *("timeout", "max_failures", "log_every", "checkpoint_every", "cache_gb"),
}


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """One piece: the model. It depends on embeddings and labels only if a loss is graded."""
    check(recipe.train)
    shards = _plan.need_index(_plan.folder(root, "shard"), "shard")
    folder = _plan.folder(root, "train", name)
    used = [entry["files"] for s in ("train", "val") for entry in _plan.of_split(shards, s)]
    settings = {"model": recipe.model.model_dump(), "train": recipe.train.model_dump()}
    if needs_embeddings(recipe.train):
        embeddings = _plan.need_index(embed.folder_of(recipe, root), "embed")
        splits = ("train", "val") if recipe.train.select == "best_ndcg" else ("train",)
        used += [entry["files"] for s in splits for entry in _plan.of_split(embeddings, s)]
    if needs_labels(recipe.train):
        settings["label"] = label.depends_on(recipe.label)
    relevant = {**settings, "train": recipe.train.model_dump(exclude=HOW)}
    piece = Piece(
        name="model",
        output=_store.join(folder, "history.json"),
        fingerprint=_store.fingerprint("train", relevant, used),
        inputs={"recipe": recipe, "root": root, "name": name, "data": shards["version"]},
    )
    return Plan.of("train", folder, [piece], settings)


def summary(piece: Piece) -> dict:
    """What the finished training left in its folder."""
    history = _store.read_json(piece.output)
    data = _store.read_bytes(piece.output)
    own = {"history.json": {"bytes": len(data), "sha256": _store.sha256(data)}}
    return {**history["summary"], "files": {**history["summary"]["files"], **own}}


def load_model(folder: str) -> tuple[TwoTower, Vocabulary, Recipe]:
    """The trained model of a folder of stage 5, in evaluation mode on the GPU if there is one."""
    index = _plan.need_index(folder, "train")
    vocabulary = models.vocabulary_of(_store.read_json(_store.join(folder, "vocabulary.json")))
    about = index["pieces"][0]
    recipe = Recipe(**about["recipe"])
    model = models.build(
        recipe.model,
        vocabulary=vocabulary,
        features=about["features"],
        architecture=about["architecture"],
    )
    model.load_state_dict(load(_store.read_bytes(_store.join(folder, "model.safetensors"))))
    return model.eval().to(World().device), vocabulary, recipe


def best_val(root: str, name: str) -> float:
    """The model's rSum on val; -1 where there is no such model or no val split."""
    index = _plan.read_index(_plan.folder(root, "train", name))
    return index["pieces"][0]["metrics"].get("val/rsum", -1.0) if index else -1.0


def fit(piece: Piece, report: Report, leaving: Callable[[], bool] = lambda: False) -> None:
    """Train to the end from the newest checkpoint; `report` gets every epoch's records.

    Every worker calls this and reports equally often; worker 0 writes. `leaving` says, to all
    workers alike, that one of them is about to be taken away: a checkpoint is written at once.
    """
    training = Training(piece, World(), report, leaving)
    while not training.over:
        training.run_epoch()
    training.publish()
