"""A model as it comes, which no step has changed: pretrained, or drawn at random from the seed."""

from functools import partial
from typing import Any

import torch

from pipeline import models
from pipeline.errors import InputError
from pipeline.labels import embed, label
from pipeline.labels.caption_vectors import Captions
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder, contents
from pipeline.training import saved_model
from pipeline.training.data import Split, word_counts
from pipeline.training.distributed import ProcessGroup
from pipeline.training.weights import published, validation
from schemas.settings import Recipe


def piece(recipe: Recipe, root: str, name: str) -> Piece:
    """What `write` makes: `train.epochs` 0. Data play a part by the words, and by val's figures."""
    shards = RunFolder(root).index("shard")
    words = () if recipe.model.text == "pretrained" else ("train",)
    used = [contents(e) for s in (*words, "val") for e in run_folder.of_split(shards, s)]
    seed, asked = recipe.train.seed, recipe.train.select == "best_ndcg"
    about = {"model": recipe.model.told(), "seed": seed, "files": _stamps(recipe.model.pretrained)}
    if asked:
        about["embeddings"] = embed.files(recipe, root).of_split("val").version
        about["label"] = label.depends_on(recipe.label)
    folder = RunFolder(root).folder("train", name)
    return Piece(
        name="model",
        output=store.join(folder, "history.json"),
        fingerprint=store.fingerprint("untouched", about, used),
        inputs={"recipe": recipe, "root": root},
    )


def _stamps(pretrained: str | None) -> dict[str, Any]:
    """Size and time of the files of a model that is a folder here: they may be others one day."""
    if pretrained is None or not store.is_local(pretrained):
        return {}
    return dict(sorted(store.list_stamps(store.absolute(pretrained)).items()))


def write(piece: Piece) -> dict:
    """Publish the model of a piece's recipe, with its figures on val; the index's summary of it."""
    recipe, root = piece.inputs["recipe"], piece.inputs["root"]
    torch.manual_seed(recipe.train.seed)
    splits = of_splits(recipe, root)
    if not splits:
        raise InputError(f"{root} holds no samples; run `halftone shard` first")
    world, some = ProcessGroup(), splits.get("train") or next(iter(splits.values()))
    try:
        if recipe.model.text != "pretrained" and "train" not in splits:
            raise InputError("the words of the text tower are those of train, which is empty")
        words = models.vocabulary_for(recipe.model, partial(word_counts, some, world))
        architecture = models.architecture(recipe.model)
        how = models.preprocessing_of(recipe.model)
        towers = models.build(
            recipe.model, vocabulary=words, features=some.features, preprocessing=how
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    towers = towers.eval().to(world.device)
    metrics = on_val(towers, words, splits.get("val"), recipe, root)
    records = [{"step": 0, "epoch": 0, **metrics}]
    weights = {name: value.cpu() for name, value in towers.state_dict().items()}
    settings = recipe.model_dump(mode="json")
    about = published.described(root, towers, some.features, architecture, how, settings)
    summary = {"epoch": 0, "metrics": metrics, **about}
    published.write(piece, weights, words.state, summary, records)
    return saved_model.summary(piece)


def of_splits(recipe: Recipe, root: str) -> dict[str, Split]:
    """The splits that hold samples, by name."""
    entries = RunFolder(root).index("shard")["pieces"]
    names = dict.fromkeys(entry["split"] for entry in entries if entry["samples"])
    how: dict[str, Any] = {"preprocessing": models.preprocessing_of(recipe.model)}
    how["copies_gb"] = recipe.train.cache_gb
    return {name: Split(root, name, **how) for name in names}


def on_val(
    towers: models.TwoTower, words, val: Split | None, recipe: Recipe, root: str
) -> dict[str, float]:
    """Figures on val as a training has them; {} where it is empty."""
    if val is None:
        return {}
    captions = None
    if recipe.train.select == "best_ndcg":
        captions = Captions.read(embed.of_shards(recipe, root, "val")[0])
    return validation.measure(towers, words, val, ProcessGroup(), recipe, captions)
