"""The same global batches on one, two and four workers: every loss has the same course."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.formulas.losses import LOSSES
from pipeline.models.regions import RegionTower
from pipeline.training import train
from pipeline.training.distributed import ProcessGroup
from pipeline.training.trainer import TowerTrainer
from tests.helpers import gloo
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its recipe)
    recipe_with,
)

STEPS = 20


class Patches(RegionTower):
    """A picture's patches as regions. Batch norms would make much of what is rounded otherwise."""

    @classmethod
    def from_settings(cls, settings, given):
        return super().from_settings(settings, replace(given, features=3))

    def forward(self, images):  # (B, 3, S, S)
        patches = torch.nn.functional.avg_pool2d(images.float() / 255, 8)
        return super().forward(patches.flatten(2).transpose(1, 2))


def course(rank: int, size: int, folder: str, pieces: dict) -> None:
    """The losses of the first steps with every loss, written by worker 0."""

    def work() -> None:
        out = {}
        for name, piece in pieces.items():
            training = TowerTrainer(piece, ProcessGroup())
            batches = zip(range(STEPS), training.batches(0), strict=False)
            out[name] = [training.learner.step(batch, k)()["train/loss"] for k, batch in batches]
        if rank == 0:
            Path(folder, f"{size}.json").write_text(json.dumps(out))

    gloo.meet(rank, size, folder, work)


@pytest.fixture(scope="module")
def courses(data, tiny_encoder, tmp_path_factory) -> dict[int, dict]:  # noqa: F811
    """By number of workers: the losses of the steps, by the name of the loss."""
    folder = tmp_path_factory.mktemp("courses")
    pieces = {}
    for name in LOSSES:
        flags = ("--train.losses", f"{{{name}: {{weight: 1}}}}", "--train.negatives_warmup", "0.5")
        # Adam divides by a gradient's own size, and makes steps of what is rounding alone.
        flags += ("--train.optimizer", "sgd", "--lr", "0.005")
        recipe = recipe_with(tiny_encoder, *flags, "--model.image", f"{__name__}:Patches")
        pieces[name] = train.plan(recipe, data[1], f"course-{name}").pieces[0]
    course(0, 1, str(folder), pieces)
    for size in (2, 4):
        gloo.together(size, course, str(folder), pieces)
    return {size: json.loads((folder / f"{size}.json").read_text()) for size in (1, 2, 4)}


@pytest.mark.parametrize("name", LOSSES)
def test_twenty_steps_have_the_losses_of_one_worker(courses, name):
    alone = courses[1][name]
    assert len(alone) == STEPS and len(set(alone)) > STEPS // 2
    for size in (2, 4):
        assert courses[size][name] == pytest.approx(alone, rel=1e-6)
