"""Checkpoints: written while training goes on, whole or not there, of what is trained alone."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from pipeline.errors import InputError
from pipeline.training import checkpoint, saved_model, train
from pipeline.training.checkpoint import Writer
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner
from pipeline.training.loop import Loop
from pipeline.training.trainer import TowerTrainer
from schemas.checkpoint import Checkpoint
from tests.helpers import gloo
from tests.pipeline.models.test_pretrained import clip  # noqa: F401  (a fixture)
from tests.pipeline.training.test_resume import Killed, kill_after, losses
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its users)
    fit,
    recipe_with,
    weights,
)


def about(step: int) -> dict:
    known = {"fingerprint": "print", "epoch": 1, "step": step, "metrics": {}, "records": []}
    known |= {"best": {"step": step, "epoch": 1}, "optimizer": {}, "settings": {}}
    return known | {"data_version": "d", "label_version": None}


class Held:
    """Writing, which waits until it is let go on."""

    def __init__(self, monkeypatch):
        self.go, write = threading.Event(), checkpoint.write
        self.begun: list[int] = []

        def held(folder, about, *given):
            self.begun.append(about["step"])
            self.go.wait(60)
            write(folder, about, *given)

        monkeypatch.setattr(checkpoint, "write", held)


# ---- in the background ---------------------------------------------------------------------------


def test_what_is_written_is_what_was_there_at_the_step(tmp_path, monkeypatch):
    held, world = Held(monkeypatch), ProcessGroup()
    writer, weight = Writer(str(tmp_path), world), torch.arange(6.0)
    writer.begin(about(1), {"model": {"w": weight.view(2, 3).T}}, [])
    weight += 1  # the step after
    assert not writer.done() and checkpoint.latest(str(tmp_path)) == (None, [])
    held.go.set()
    writer.wait()
    (found, files), torn = checkpoint.latest(str(tmp_path))
    assert found.step == 1 and not torn and writer.done()
    assert torch.equal(files["model"]["w"], torch.arange(6.0).view(2, 3).T)


def test_one_is_in_flight_at_most_and_memory_is_used_again(tmp_path, monkeypatch):
    held, world = Held(monkeypatch), ProcessGroup()
    writer, weight = Writer(str(tmp_path), world), torch.zeros(3)
    writer.begin(about(1), {"model": {"w": weight}}, [])
    memory = writer._copies["model"]["w"].data_ptr()
    weight += 1
    second = threading.Thread(target=writer.begin, args=(about(2), {"model": {"w": weight}}, []))
    second.start()
    second.join(0.2)
    assert second.is_alive() and held.begun == [1]  # it waits for the first
    held.go.set()
    second.join(60)
    writer.wait()
    assert held.begun == [1, 2] and writer._copies["model"]["w"].data_ptr() == memory
    kept = [checkpoint.read(f"{tmp_path}/{checkpoint.name_of(step)}") for step in (1, 2)]
    assert [files["model"]["w"].tolist() for _, files in kept] == [[0.0] * 3, [1.0] * 3]


def test_a_checkpoint_that_cannot_be_written_ends_the_training(data, tiny_encoder):  # noqa: F811
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.checkpoint_every", "7")
    piece = train.plan(recipe, root, "unwritten").pieces[0]
    training = Loop(TowerTrainer, piece)
    folder = Path(root) / "5-model/unwritten/checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000014").write_text("a file where a folder has to be")
    told = []
    training.report = told.append
    with pytest.raises(OSError):
        training.run()
    assert training.step in (20, 21)  # where a record was read, or before the next was begun
    assert checkpoint.latest(str(folder))[0][0].step == 7 and len(told) == 1


def test_a_training_that_ends_otherwise_leaves_its_checkpoint_whole(
    data,  # noqa: F811
    tiny_encoder,
    monkeypatch,
):
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.checkpoint_every", "7")
    kill_after(monkeypatch, 7)  # the very next step
    with pytest.raises(Killed):
        fit(recipe, root, "ended")
    found, torn = checkpoint.latest(f"{root}/5-model/ended/checkpoints")
    assert found[0].step == 7 and not torn


def test_what_is_reported_is_durable(data, tiny_encoder):  # noqa: F811
    """Every record once, in order, and none before a checkpoint that holds it can be read."""
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.checkpoint_every", "7", "--train.log_every", "2")
    folder, told = f"{root}/5-model/durable/checkpoints", []

    def report(records: list[dict]) -> None:
        (found, _), torn = checkpoint.latest(folder)
        assert not torn and found.step >= records[-1]["step"]
        assert found.records[-len(records) :] == records
        told.extend(records)

    fit(recipe, root, "durable", report)
    kept = checkpoint.latest(folder)[0][0].records
    assert told == kept and len(told) == 32


def broken(rank: int, size: int, folder: str) -> None:
    """Worker 0's disk is full; every worker hears of it."""

    def work() -> None:
        writer = Writer(f"{folder}/checkpoints", ProcessGroup())
        Path(folder, "checkpoints").write_text("a file where a folder has to be")
        writer.begin(about(1), {"model": {"w": torch.zeros(2)}}, [])
        try:
            writer.wait()
        except OSError as error:
            Path(folder, f"{rank}.txt").write_text(str(error))

    gloo.meet(rank, size, folder, work)


def test_every_worker_hears_of_a_checkpoint_that_cannot_be_written(tmp_path):
    gloo.together(2, broken, str(tmp_path))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert "checkpoints" in said[0] and "a checkpoint could not be written" in said[1]


# ---- of what is trained --------------------------------------------------------------------------

LORA = ("--model.image", "pretrained", "--model.text", "pretrained", "--model.lora_rank", "2")
FEW = ("--train.pairs", "image", "--train.log_every", "1")


LEARNED = ("--train.losses", "{info_nce: {temperature: learned}}")
LAST = ("--model.freeze", "2")


@pytest.mark.parametrize("how", [("--model.lora_rank", "2", *LEARNED), LAST])
def test_a_checkpoint_holds_what_is_trained_and_the_model_all(
    data,  # noqa: F811
    tiny_encoder,
    clip,  # noqa: F811
    monkeypatch,
    how,
):
    _, root = data
    name = how[0][-4:]
    flags = (*LORA[:4], *how, *FEW, "--model.pretrained", clip, "--train.ema", "0.5")
    recipe = recipe_with(tiny_encoder, *flags)
    fit(recipe, root, f"small-{name}")
    with monkeypatch.context() as deadly, pytest.raises(Killed):
        kill_after(deadly, 9)
        fit(recipe, root, f"small-{name}-killed")
    learners, build = [], Learner.__init__

    def listening(self, *given, **named):
        build(self, *given, **named)
        learners.append(self)

    monkeypatch.setattr(Learner, "__init__", listening)
    fit(recipe, root, f"small-{name}-killed")
    one, two = weights(root, f"small-{name}"), weights(root, f"small-{name}-killed")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert losses(root, f"small-{name}") == losses(root, f"small-{name}-killed")
    model = learners[0].model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    folder = Path(root, f"5-model/small-{name}/checkpoints/step-00000012")
    for file in ("model", "raw"):
        assert load_file(folder / f"{file}.safetensors").keys() == model.state_dict().keys() - (
            {n for n, _ in model.named_parameters()} - trained
        )
    slots = {key.rpartition("/")[0] for key in load_file(folder / "optimizer.safetensors")}
    assert slots == trained and one.keys() == model.state_dict().keys()
    assert (folder / "model.safetensors").stat().st_size * 2 < sum(
        tensor.nbytes for tensor in one.values()
    )
    learned = saved_model.load_model(f"{root}/5-model/small-{name}").towers.learned
    assert list(learned) == (["info_nce_temperature"] if LEARNED[1] in how else [])


def test_it_goes_on_with_the_weights_it_was_made_with_alone(
    data,  # noqa: F811
    tiny_encoder,
    clip,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    _, root = data
    folder = tmp_path / "weights"
    shutil.copytree(clip, folder)
    recipe = recipe_with(tiny_encoder, *LORA, *FEW, "--model.pretrained", str(folder))
    with monkeypatch.context() as deadly, pytest.raises(Killed):
        kill_after(deadly, 9)
        fit(recipe, root, "based")
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.vision_model.encoder.layers[1].mlp.fc1.weight[0, 0] += 1e-3
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="made with other weights of the .* not trained"):
        fit(recipe, root, "based")


def test_a_whole_checkpoint_of_before_is_taken_up_by_a_training_of_a_part(
    data,  # noqa: F811
    tiny_encoder,
    clip,  # noqa: F811
):
    """All weights trained for an epoch, then, with --resume, the last layer and what follows it."""
    _, root = data
    flags = (*LORA[:4], *FEW, "--model.pretrained", clip, "--train.epochs", "1")
    fit(recipe_with(tiny_encoder, *flags, "--train.optimizer", "sgd"), root, "whole-first")
    uri = f"{root}/5-model/whole-first/checkpoints/step-00000006"
    recipe = recipe_with(
        *(tiny_encoder, *flags, "--train.optimizer", "sgd", "--train.momentum", "0.9"),
        *("--model.freeze", "2", "--train.epochs", "2", "--resume", uri),
    )
    piece = train.plan(recipe, root, "part-then").pieces[0]
    before = checkpoint.identity(
        checkpoint.frozen(TowerTrainer(piece, ProcessGroup()).learner.model)
    )
    fit(recipe, root, "part-then")
    found = checkpoint.read(f"{root}/5-model/part-then/checkpoints/step-00000012")[0]
    assert isinstance(found, Checkpoint) and found.base != before
