"""Weights spread over the workers (FSDP): the same training as whole ones (DDP), val included."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from pipeline.models.tuning.blocks import blocks_of
from pipeline.storage import store
from pipeline.training import saved_model, train
from pipeline.training.loop import Loop
from pipeline.training.trainer import TowerTrainer
from tests.helpers import gloo
from tests.pipeline.models.test_pretrained import clip  # noqa: F401  (a fixture)
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its users)
    recipe_with,
    weights,
)

# Adam divides by a gradient's own size, and makes steps of what is rounding alone.
FLAGS = ("--train.optimizer", "sgd", "--lr", "0.02", "--train.epochs", "2")
FLAGS += ("--train.pairs", "image", "--train.lanes", "4", "--train.log_every", "1")
FLAGS += ("--train.batch_size", "32")  # three steps an epoch
CLIP = ("--model.image", "pretrained", "--model.text", "pretrained")
LEARNED = ("--train.losses", "{info_nce: {temperature: {learned: 0.1}}}")
LEARNED += ("--train.temperature_lr", "0.5")
LOCKED = ("--model.tune_image.mode", "frozen", "--model.tune_text", "{mode: last, layers: 1}")
CASES: dict[str, tuple[str, ...]] = {
    "all": CLIP,
    "frozen": (*CLIP, "--model.freeze", "1"),
    "lora": (*CLIP, "--model.lora_rank", "2"),
    "averaged": (*CLIP, "--train.ema", "0.5", *LEARNED),
    "chunked": (*CLIP, "--train.chunk", "3", *LEARNED),
    "locked": (*CLIP, *LOCKED, *LEARNED),
    "projected": ("--model.image", "pretrained", *LOCKED[:2], *LEARNED),
    "recomputed": (*CLIP, "--model.gradient_checkpointing", "true", "--model.freeze", "1"),
    "own tower": ("--model.image", "tests.pipeline.training.test_many_workers:Patches"),
}
BLOCKS = {"own tower": 0, "projected": 3}  # of both towers, of others six
HALF = {f"{name} bf16": (*CASES[name], "--train.precision", "amp_bf16") for name in ("all", "lora")}
HALF["pixels bf16"] = ("--train.precision", "amp_bf16")
# Two workers all the way are the first half of two that become four.
BY = {
    "ddp-2": [*CASES, *HALF],
    "fsdp-2": ["lora", *HALF],
    "fsdp-4": ["all", "chunked", "own tower"],
    "fsdp-2-4": [*CASES],
}


def train_all(rank: int, size: int, folder: str, pieces: dict, stop: int) -> None:
    """Every piece up to so many epochs, and published at their end."""

    def work() -> None:
        shards = {}
        for name, piece in pieces.items():
            training = Loop(TowerTrainer, piece)
            while not training.over and training.epoch < stop:
                training.run_epoch()
            training.settle()
            if training.over:
                training.publish()
            towers = training.trainer.learner.model.children()
            blocks = [block for tower in towers for block in blocks_of(tower)[1]]
            shards[name] = [len(blocks), sum(isinstance(block, FSDPModule) for block in blocks)]
        if rank == 0:
            Path(folder, f"{size}-{stop}.json").write_text(json.dumps(shards))

    gloo.meet(rank, size, folder, work)


@pytest.fixture(scope="module")
def trained(data, tiny_encoder, clip, tmp_path_factory):  # noqa: F811
    """`trained(name, how)`: weights and figures; how: ddp-2, fsdp-2, fsdp-4, or fsdp-2-4."""
    root, folder = data[1], tmp_path_factory.mktemp("sharded")

    @functools.cache
    def blocks(how: str) -> dict[str, list[int]]:
        """Train its cases so; the blocks of the towers, and how many are spread out."""
        sharding, *sizes = how.split("-")
        flags = (*FLAGS, "--train.sharding", sharding, "--model.pretrained", clip)
        plans = {}
        for name in BY[how]:
            recipe = recipe_with(tiny_encoder, *flags, *(CASES | HALF)[name])
            plans[name] = train.plan(recipe, root, f"{name.replace(' ', '-')}-{how}")
        pieces = {name: plan.pieces[0] for name, plan in plans.items()}
        for stop, size in enumerate(map(int, sizes), 3 - len(sizes)):
            place = folder / f"{how}-{stop}"
            place.mkdir()
            gloo.together(size, train_all, str(place), pieces, stop)
        for name, plan in plans.items():
            plan.finish({"model": saved_model.summary(pieces[name])})
        return json.loads((place / f"{size}-{stop}.json").read_text())

    def of(name: str, how: str) -> tuple[dict, list[dict], list[int]]:
        found, kept = blocks(how)[name], f"{name.replace(' ', '-')}-{how}"
        records = store.read_json(f"{root}/5-model/{kept}/history.json")["records"]
        return weights(root, kept), records, found

    return of


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for how in BY if how != "ddp-2" for name in BY[how] if name in CASES],
)
def test_spread_out_weights_take_the_steps_of_whole_ones(trained, name, how):
    (whole, records, _), (spread, its, (blocks, shared)) = (
        trained(name, "ddp-2"),
        trained(name, how),
    )
    assert whole.keys() == spread.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(spread[key], tensor, atol=1e-6, rtol=1e-5, msg=key)
    assert blocks == shared == BLOCKS.get(name, 6)  # three in each tower
    for one, two in zip(records, its, strict=True):
        assert one["step"] == two["step"]
        assert {k: v for k, v in two.items() if k.startswith("val/")} == pytest.approx(
            {k: v for k, v in one.items() if k.startswith("val/")}
        )
    assert any("val/rsum" in record for record in its)


@pytest.mark.parametrize("name", HALF)
def test_in_bf16_they_take_nearly_the_same(trained, name):
    (whole, records, _), (spread, its, _) = trained(name, "ddp-2"), trained(name, "fsdp-2")
    for key, tensor in whole.items():
        torch.testing.assert_close(spread[key], tensor, atol=3e-2, rtol=3e-2, msg=key)
    losses = [[r["train/loss"] for r in found if "train/loss" in r] for found in (records, its)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_what_was_spread_out_is_loaded_whole(trained, data):  # noqa: F811
    trained("lora", "fsdp-2")
    model = saved_model.load_model(f"{data[1]}/5-model/lora-fsdp-2")
    assert model.embed_texts(["a red circle"]).shape == (1, 24)
