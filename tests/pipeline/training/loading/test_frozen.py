"""A frozen tower's vectors are made once, and a training with them is the one without them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.storage import parquet
from pipeline.storage.vector_columns import vector_matrix
from pipeline.training import data as training_data
from pipeline.training import train
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loading import making
from pipeline.training.loop import Loop
from pipeline.training.trainer import TowerTrainer
from tests.helpers import gloo
from tests.pipeline.models.test_pretrained import clip  # noqa: F401  (a fixture)
from tests.pipeline.training.test_train import (
    Killed,
    data,  # noqa: F401  (a fixture, and its users)
    fit,
    recipe_with,
    weights,
)

# Adam divides by a gradient's own size, and makes steps of what is rounding alone.
FLAGS = ("--train.optimizer", "sgd", "--lr", "0.02", "--train.epochs", "2", "--train.lanes", "4")
FLAGS += ("--train.pairs", "image", "--train.log_every", "1")
FLAGS += ("--train.losses", "{info_nce: {temperature: learned}}")
BOTH = ("--model.image", "pretrained", "--model.text", "pretrained")
FROZEN = ("--model.tune_image.mode", "frozen")
CASES = {
    "locked": (*BOTH, *FROZEN, "--model.tune_text", "{mode: last, layers: 1}"),
    "new projection": ("--model.image", "pretrained", *FROZEN),  # which is trained
    "text": ("--model.tune_text.mode", "frozen"),  # of a GRU
}


@pytest.fixture
def own(data, tmp_path):  # noqa: F811
    """A run folder in which nothing was trained."""
    root = str(tmp_path / "run")
    shutil.copytree(data[1], root)
    shutil.rmtree(f"{root}/5-model", ignore_errors=True)
    return root


def kept(root: str) -> dict[str, np.ndarray]:
    """All vectors that were made, by file."""
    files = sorted(Path(root, "5-model/frozen").rglob("*.parquet"))
    tables = {f.stem: parquet.read_table(str(f)) for f in files}
    return {name: vector_matrix(table["vector"]) for name, table in tables.items()}


def refuse(*given, **how):
    raise AssertionError("a picture was decoded")


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_training_without_them(own, tiny_encoder, clip, name, monkeypatch):  # noqa: F811
    flags = (*FLAGS, "--model.pretrained", clip, *CASES[name])
    side = "text" if name == "text" else "image"
    index = fit(recipe_with(tiny_encoder, *flags), own, "kept")
    assert index["pieces"][0]["frozen"] == [side]
    made = kept(own)
    # val's pictures are shown in every epoch too.
    assert len(made) == (3 if side == "text" else 4)
    if side == "image":
        with monkeypatch.context() as patch:
            patch.setattr(making, "decode", refuse)
            patch.setattr(training_data, "decode", refuse)
            fit(recipe_with(tiny_encoder, *flags), own, "again")
        one, two = weights(own, "kept"), weights(own, "again")
        assert all(torch.equal(one[key], two[key]) for key in two)
    off = recipe_with(tiny_encoder, *flags, "--train.frozen_vectors", "off")
    assert "frozen" not in fit(off, own, "anew")["pieces"][0]
    one, two = weights(own, "kept"), weights(own, "anew")
    assert one.keys() == two.keys() and "learned.info_nce_temperature" in one
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=1e-5, msg=key)


def test_killed_it_goes_on_bit_for_bit(own, tiny_encoder, clip):  # noqa: F811
    recipe = recipe_with(tiny_encoder, *FLAGS, "--model.pretrained", clip, *CASES["locked"])
    fit(recipe, own, "whole")

    def kill(records):
        raise Killed

    with pytest.raises(Killed):
        fit(recipe, own, "killed", kill)
    epochs = []
    fit(recipe, own, "killed", lambda records: epochs.append(records[-1]["epoch"]))
    one, two = weights(own, "whole"), weights(own, "killed")
    assert epochs == [2] and all(torch.equal(one[key], two[key]) for key in two)


def worker(rank: int, size: int, folder: str, piece) -> None:
    def work() -> None:
        loop = Loop(TowerTrainer, piece)
        loop.run()

    gloo.meet(rank, size, folder, work)


def test_whoever_makes_them_they_are_the_same_bits(own, tiny_encoder, clip, tmp_path):  # noqa: F811
    recipe = recipe_with(tiny_encoder, *FLAGS, "--model.pretrained", clip, *CASES["locked"])
    found = {}
    for size in (1, 2):
        piece = train.plan(recipe, own, f"of-{size}").pieces[0]
        gloo.together(size, worker, str(tmp_path), piece)
        found[size] = kept(own), weights(own, f"of-{size}")
        shutil.rmtree(f"{own}/5-model/frozen")
    (one, its), (two, others) = found[1], found[2]
    assert len(one) == 4 and all(np.array_equal(one[name], two[name]) for name in one)
    for key in its:
        torch.testing.assert_close(its[key], others[key], atol=1e-6, rtol=1e-5, msg=key)


def sides_of(root: str, recipe) -> list[str]:
    training = TowerTrainer(train.plan(recipe, root, "parts").pieces[0], ProcessGroup())
    return sorted(training.frozen_towers.parts)


def test_they_are_kept_where_it_pays_and_can_be(own, tiny_encoder):
    def sides(*flags: str) -> list[str]:
        given = ("--train.pairs", "image", "--train.epochs", "2", *flags)
        return sides_of(own, recipe_with(tiny_encoder, *given))

    image, text = FROZEN, ("--model.tune_text.mode", "frozen")
    assert sides(*image) == ["image"] and sides(*image, "--train.epochs", "1") == []
    assert sides(*image, "--train.epochs", "1", "--train.pairs", "caption") == ["image"]
    assert sides(*text) == []  # five captions each, of which two epochs show two
    assert sides(*text, "--train.epochs", "6") == ["text"]
    assert sides(*text, "--train.frozen_vectors", "on") == ["text"]
    assert sides(*image, "--train.flip", "true") == sides(*image, "--train.frozen_vectors", "off")
    for flags in ((), (*image, "--train.crop", "0.5")):
        with pytest.raises(InputError, match="no tower gives an input the same vector"):
            sides("--train.frozen_vectors", "on", *flags)


def test_other_weights_have_other_vectors(own, tiny_encoder):
    def files(*flags: str) -> list[str]:
        recipe = recipe_with(tiny_encoder, *FROZEN, *flags)
        piece = train.plan(recipe, own, "other").pieces[0]
        training = TowerTrainer(piece, ProcessGroup())
        return training.frozen_towers.vectors_of(training.train_split, ["image"])["image"].uris

    same = files()
    assert files("--model.word_dim", "20", "--lr", "0.1") == same  # of texts, of training
    for flags in (("--train.seed", "1"), ("--model.image_size", "32"), ("--model.width", "4")):
        assert not {*files(*flags)} & {*same}


def test_nothing_to_train_is_refused(own, tiny_encoder):
    flags = (*FROZEN, "--model.tune_text.mode", "frozen")
    with pytest.raises(InputError, match="nothing is trained: both towers are frozen"):
        sides_of(own, recipe_with(tiny_encoder, *flags))
