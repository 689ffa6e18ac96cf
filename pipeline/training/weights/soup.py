"""The mean of the weights of models that were tuned from the same ones, chosen on val (a soup).

Wortsman et al., Model soups, ICML 2022: uniform is the mean of all; greedy begins with the best on
val, and takes in turn each, the best first, with which the mean is no worse on val.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from pipeline.errors import InputError, StageMissing, did_you_mean
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder, contents
from pipeline.training import checkpoint, saved_model
from pipeline.training.loop import CHOSEN_BY
from pipeline.training.saved_model import SavedModel
from pipeline.training.weights import norms, published, untouched
from schemas.settings import Recipe

ALL = "all"  # NAME@all: every epoch that is kept
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ingredient:
    """A model of the run folder, as it was handed on or as it was after an epoch."""

    name: str  # as it is told
    model: str
    folder: str  # of its weights
    metrics: dict[str, float]  # on val
    version: str  # of what it holds

    def weights(self, root: str) -> Weights:
        """All its weights; of an epoch's checkpoint those never trained are the model's."""
        of_model = RunFolder(root).folder("train", self.model, "model.safetensors")
        whole = load(store.read_bytes(of_model))
        if self.name == self.model:
            return whole
        found = checkpoint.read(self.folder)
        if found is None:
            raise InputError(f"{self.folder} is torn; train again, or leave {self.name} out")
        return {**whole, **found[1]["model"]}


def piece(recipe: Recipe, root: str, name: str) -> Piece:
    """What `write` makes: the model of `train.soup`."""
    shards = RunFolder(root).index("shard")
    used = [contents(entry) for entry in run_folder.of_split(shards, "val")]
    found = [one for asked in recipe.train.soup for one in ingredients(root, asked, name)]
    if len(found) < 2:
        kept = "; train.keep_epochs keeps more epochs" if "@" in recipe.train.soup[0] else ""
        raise InputError(f"train.soup comes to {len(found)} model; name two or more{kept}")
    s = recipe.train
    about = [s.soup_choice, s.select, *(one.version for one in found)]
    return Piece(
        name="model",
        output=RunFolder(root).folder("train", name, "history.json"),
        fingerprint=store.fingerprint("soup", about, used),
        inputs={"recipe": recipe, "root": root, "ingredients": found},
    )


def ingredients(root: str, asked: str, name: str) -> Iterator[Ingredient]:
    """The models that NAME, NAME@EPOCH or NAME@all stands for, in order."""
    model, at, epoch = asked.partition("@")
    known = RunFolder(root).models()
    if model == name or model not in known:
        near = did_you_mean(model, [one for one in known if one != name])
        raise StageMissing(f"train.soup names {model!r}, which is no other model of {root}{near}")
    index = RunFolder(root).index("train", model)
    if not at:
        metrics, folder = index["pieces"][0]["metrics"], RunFolder(root).folder("train", model)
        yield Ingredient(model, model, folder, metrics, index["version"])
        return
    kept = dict(_epochs(RunFolder(root).folder("train", model, "checkpoints")))
    if epoch != ALL and epoch not in kept:
        there = ", ".join(kept) or "none"
        raise InputError(
            f"train.soup names {asked!r}, and the epochs of {model} whose checkpoints are kept "
            f"are {there}; train it with train.keep_epochs, or write {model}@{ALL}"
        )
    for number in kept if epoch == ALL else [epoch]:
        folder, found = kept[number]
        version = store.fingerprint(index["version"], found["files"])
        yield Ingredient(f"{model}@{number}", model, folder, found["metrics"], version)


def _epochs(folder: str) -> Iterator[tuple[str, tuple[str, dict]]]:
    """(epoch, (folder, checkpoint.json)) of the checkpoints that end one."""
    for name in store.list_folders(folder):
        uri = store.join(folder, name)
        if store.exists(about := store.join(uri, "checkpoint.json")):
            found = store.read_json(about)
            if found["metrics"]:  # those inside an epoch have none
                yield str(found["epoch"]), (uri, found)


def write(piece: Piece) -> dict:
    """Publish the soup of a piece; the index's summary of it."""
    recipe, root = piece.inputs["recipe"], piece.inputs["root"]
    found: list[Ingredient] = piece.inputs["ingredients"]
    first = saved_model.load_model(RunFolder(root).folder("train", found[0].model))
    pot = Pot(first, recipe, root)
    by = CHOSEN_BY.get(recipe.train.select, "val/rsum")
    if recipe.train.soup_choice == "greedy":
        chosen, weights, metrics, told = pot.greedy(found, by)
    else:
        chosen, (weights, metrics), told = found, pot.tasted(pot.mean(found)), []
    best = max((one.metrics[by] for one in found if by in one.metrics), default=None)
    index = RunFolder(root).index("train", found[0].model)["pieces"][0]
    settings = recipe.model_dump(mode="json") | {"model": index["recipe"]["model"]}
    about = published.described(
        *(root, first.towers, first.features, index["architecture"]),
        *(first.preprocessing, settings),
    )
    summary: dict[str, Any] = {"epoch": 0, "metrics": metrics, **about}
    summary["soup"] = {"of": [one.name for one in chosen], "tried": told}
    if best is not None and by in metrics:
        summary["soup"]["over_best"] = metrics[by] - best
    records = [{"step": 0, "epoch": 0, **metrics}]
    published.write(piece, weights, first.vocabulary.state, summary, records)
    return saved_model.summary(piece)


class Pot:
    """Towers that weights are tried in, and the data they are tried on."""

    def __init__(self, model: SavedModel, recipe: Recipe, root: str):
        self.model, self.recipe, self.root = model, recipe, root
        tried = recipe.model_copy(update={"model": model.recipe.model})
        self.tried, self.splits = tried, untouched.of_splits(tried, root)
        if any(".lora_" in name for name in model.towers.state_dict()):
            raise InputError(
                "train.soup: the mean of low-rank updates is no update's mean, so models with "
                "LoRA are not averaged; average models that were tuned whole"
            )
        if norms.has_any(model.towers) and "train" not in self.splits:
            raise InputError(
                "train.soup: these towers have batch norms, whose moments are taken of train, "
                "and it is empty; shard train, or average towers without batch norms"
            )

    def weights(self, one: Ingredient) -> Weights:
        """Those of an ingredient, refused where they are not of such towers."""
        found, own = one.weights(self.root), self.model.towers.state_dict()
        shapes = {name: value.shape for name, value in found.items()}
        if shapes != {name: value.shape for name, value in own.items()}:
            raise InputError(
                f"train.soup: {one.name} has other towers than the first model; average models "
                "that were tuned from the same one"
            )
        return found

    def mean(self, some: list[Ingredient]) -> Weights:
        """The mean of weights, one model in memory beside it; what is counted is the first's."""
        total: Weights = {}
        for number, one in enumerate(some):
            for name, value in self.weights(one).items():
                if not value.is_floating_point():
                    total.setdefault(name, value)
                elif number:
                    total[name].add_(value.double())
                else:
                    total[name] = value.double()
        own = self.model.towers.state_dict()
        return {
            name: (value / len(some)).to(own[name].dtype) if value.is_floating_point() else value
            for name, value in total.items()
        }

    def tasted(self, weights: Weights) -> tuple[Weights, dict[str, float]]:
        """The weights with their batch norms' moments, and their figures on val."""
        towers, words = self.model.towers, self.model.vocabulary
        towers.load_state_dict(weights)
        if "train" in self.splits:
            given = words, self.splits["train"], self.tried, self.model.device
            weights = {**weights, **norms.renew(towers, *given)}
        val = self.splits.get("val")
        return weights, untouched.on_val(towers, words, val, self.tried, self.root)

    def greedy(
        self, found: list[Ingredient], by: str
    ) -> tuple[list[Ingredient], Weights, dict[str, float], list[dict]]:
        """(those taken, the mean's weights, its figures, what every try gave)."""
        if lacking := [one.name for one in found if by not in one.metrics]:
            raise InputError(
                f"train.soup: nothing is known of {lacking[0]} on val ({by}), and greedy chooses "
                "by that; set train.soup_choice uniform, or give the run a val split"
            )
        order = sorted(found, key=lambda one: -one.metrics[by])
        taken: list[Ingredient] = []
        kept: tuple[Weights, dict[str, float]] | None = None
        told: list[dict] = []
        for one in order:
            tried = self.tasted(self.mean([*taken, one]))
            better = kept is None or tried[1][by] >= kept[1][by]
            told.append({"with": one.name, by: tried[1][by], "taken": better})
            if better:
                taken, kept = [*taken, one], tried
        assert kept is not None
        return taken, *kept, told
