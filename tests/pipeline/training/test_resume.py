"""A training that stops anywhere goes on where it was: same samples, same losses, same weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.errors import InputError
from pipeline.storage import store
from pipeline.training import train
from pipeline.training.learner import Learner
from pipeline.training.loop import Loop, at_pace
from pipeline.training.trainer import TowerTrainer
from tests.helpers import gloo
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its users)
    fit,
    recipe_with,
    weights,
)


class Killed(BaseException):
    """Ends a training the hard way."""


def listen(monkeypatch) -> list[tuple[int, tuple]]:
    """(step, caption rows) of every step that is taken from now on."""
    steps, take = [], Learner.step

    def listening(self, batch, number):
        steps.append((number, tuple(batch.caption_rows.tolist())))
        return take(self, batch, number)

    monkeypatch.setattr(Learner, "step", listening)
    return steps


def kill_after(monkeypatch, step: int) -> None:
    take = Learner.step

    def deadly(self, batch, number):
        if number == step:
            raise Killed
        return take(self, batch, number)

    monkeypatch.setattr(Learner, "step", deadly)


def losses(root: str, name: str) -> list[tuple[int, float]]:
    records = store.read_json(f"{root}/5-model/{name}/history.json")["records"]
    return [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]


FLAGS = ("--train.checkpoint_every", "7", "--train.log_every", "1", "--train.ema", "0.9")


@pytest.fixture(scope="module")
def undisturbed(data, tiny_encoder) -> dict[int, tuple]:  # noqa: F811
    """The steps of the training "undisturbed", which ran through."""
    with pytest.MonkeyPatch.context() as patch:
        steps = listen(patch)
        fit(recipe_with(tiny_encoder, *FLAGS), data[1], "undisturbed")
    return dict(steps)


@pytest.mark.parametrize("killed_at", [[0], [3], [7, 8], [29, 30, 31], [5, 17, 44, 59]])
def test_killed_between_checkpoints_it_ends_bit_for_bit_the_same(
    data,  # noqa: F811
    tiny_encoder,
    monkeypatch,
    undisturbed,
    killed_at,
):
    _, root = data
    recipe = recipe_with(tiny_encoder, *FLAGS)
    name = f"killed-{'-'.join(map(str, killed_at))}"
    seen = listen(monkeypatch)
    for step in killed_at:
        with monkeypatch.context() as deadly, pytest.raises(Killed):
            kill_after(deadly, step)
            fit(recipe, root, name)
    fit(recipe, root, name)
    assert (
        dict(seen) == undisturbed and len(undisturbed) == 60
    )  # replayed steps saw what they saw before
    assert losses(root, name) == losses(root, "undisturbed")
    one, two = weights(root, name), weights(root, "undisturbed")
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_a_warning_that_the_node_leaves_writes_a_checkpoint_at_once(data, tiny_encoder):  # noqa: F811
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.log_every", "4")
    plan = train.plan(recipe, root, "leaving")
    folder = Path(root) / "5-model/leaving/checkpoints"
    written = []

    def leaving() -> bool:
        written.append({path.name for path in folder.glob("step-*")})
        return len(written) == 2

    train.fit(plan.pieces[0], lambda records: None, leaving)
    assert "step-00000008" in written[2] and "step-00000004" not in written[2]


def test_a_torn_newest_checkpoint_is_told(data, tiny_encoder):  # noqa: F811
    recipe, root = data
    fit(recipe, root, "told")
    newest = Path(root) / "5-model/told/checkpoints/step-00000060/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert fit(recipe, root, "told")["pieces"][0]["torn_checkpoints"] == ["step-00000060"]


def test_training_ends_when_val_has_not_risen_for_so_many_epochs(data, tiny_encoder, monkeypatch):  # noqa: F811
    _, root = data
    rsums = iter([10.0, 30.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr(TowerTrainer, "validate", lambda self: {"val/rsum": next(rsums)})
    recipe = recipe_with(tiny_encoder, "--train.patience", "2", "--train.epochs", "5")
    entry = fit(recipe, root, "patience")["pieces"][0]
    assert entry["epoch"] == 2 and next(rsums) == 40.0


def test_the_batch_that_broke_it_is_kept(data, tiny_encoder):  # noqa: F811
    _, root = data
    recipe = recipe_with(tiny_encoder, "--lr", "1e30")
    with pytest.raises(InputError, match="its batch is kept in") as refused:
        fit(recipe, root, "broke")
    uri = str(refused.value).split("kept in ")[1]
    step = int(Path(uri).stem.split("-")[2])
    assert load_file(uri)["caption_rows"].shape == (16,) and step <= 2


def test_collapsed_towers_are_counted(data, tiny_encoder, monkeypatch):  # noqa: F811
    from pipeline.models import TwoTower

    _, root = data
    recipe = recipe_with(tiny_encoder)
    assert fit(recipe, root, "upright")["pieces"][0]["collapsed"] == []
    encode = TwoTower.encode_image
    one = torch.ones(1, recipe.model.dim) * 100
    monkeypatch.setattr(
        TwoTower,
        "encode_image",
        lambda self, images: torch.nn.functional.normalize(encode(self, images) + one, dim=1),
    )
    assert fit(recipe, root, "collapsed")["pieces"][0]["collapsed"] == [1, 2]


def test_more_epochs_go_on_from_the_newest_checkpoint(data, tiny_encoder, monkeypatch):  # noqa: F811
    _, root = data
    constant = ("--train.lr_schedule", "constant")
    fit(recipe_with(tiny_encoder, "--train.epochs", "4", *constant), root, "four")
    fit(recipe_with(tiny_encoder, *constant), root, "longer")
    seen = listen(monkeypatch)
    longer = recipe_with(tiny_encoder, "--train.epochs", "4", "--resume", "latest", *constant)
    fit(longer, root, "longer")
    assert [step for step, _ in seen] == list(range(60, 120))
    assert losses(root, "longer") == losses(root, "four")
    one, two = weights(root, "longer"), weights(root, "four")
    assert all(torch.equal(one[key], two[key]) for key in two)
    seen.clear()
    fit(longer, root, "longer")
    assert not seen


def test_other_batches_begin_the_epoch_again(data, tiny_encoder, monkeypatch):  # noqa: F811
    _, root = data
    fit(recipe_with(tiny_encoder), root, "rebatched")
    seen = listen(monkeypatch)
    flags = ("--train.epochs", "3", "--batch-size", "32", "--resume", "latest")
    fit(recipe_with(tiny_encoder, *flags), root, "rebatched")
    assert [step for step, _ in seen] == list(range(30, 45))
    records = store.read_json(f"{root}/5-model/rebatched/history.json")["records"]
    ends = [(r["step"], r["epoch"]) for r in records if "epoch" in r]
    assert ends == [(15, 1), (30, 2), (45, 3)]  # one curve, from its beginning


def test_steps_of_before_are_told_at_the_new_pace():
    before = [{"step": step, "train/loss": 1.0 / step} for step in range(1, 26)]
    before[10:10] = [{"step": 10, "epoch": 1, "val/rsum": 5.0}]
    before[21:21] = [{"step": 20, "epoch": 2, "val/rsum": 6.0}]
    half = at_pace(before, 2, 5)  # 10 steps an epoch become 5
    assert [r["step"] for r in half if "epoch" not in r] == list(range(1, 11))
    assert [(r["step"], r["val/rsum"]) for r in half if "epoch" in r] == [(5, 5.0), (10, 6.0)]
    twice = at_pace(before, 1, 20)
    assert [r["step"] for r in twice] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 20]
    assert at_pace(before, 0, 5) == at_pace([], 1, 5) == []


def test_another_model_goes_on_from_a_named_checkpoint(data, tiny_encoder, monkeypatch):  # noqa: F811
    recipe, root = data
    fit(recipe, root, "named")
    uri = f"{root}/5-model/named/checkpoints/step-00000030"
    seen = listen(monkeypatch)
    entry = fit(recipe_with(tiny_encoder, "--resume", uri, "--lr", "1e-4"), root, "heir")
    assert [step for step, _ in seen] == list(range(30, 60))
    assert entry["pieces"][0]["epoch"] == 2
    for given, sentence in [
        ("nowhere", "is no whole checkpoint"),
        (f"{root}/5-model/named/checkpoints/step-00000060", "ends epoch 2 already"),
    ]:
        with pytest.raises(InputError, match=sentence):
            fit(recipe_with(tiny_encoder, "--resume", given, "--lr", "1e-4"), root, "orphan")
    wider = recipe_with(tiny_encoder, "--model.dim", "8", "--resume", uri)
    with pytest.raises(InputError, match="does not fit: other towers"):
        fit(wider, root, "orphan")


def test_patience_begins_anew_where_another_training_s_checkpoint_is_taken(
    data,  # noqa: F811
    tiny_encoder,
    monkeypatch,
):
    recipe, root = data
    fit(recipe, root, "testator")
    rsums = iter([30.0, 20.0])
    monkeypatch.setattr(TowerTrainer, "validate", lambda self: {"val/rsum": next(rsums)})
    uri = f"{root}/5-model/testator/checkpoints/step-00000060"
    flags = ("--resume", uri, "--train.epochs", "9", "--train.patience", "1")
    assert fit(recipe_with(tiny_encoder, *flags), root, "heiress")["pieces"][0]["epoch"] == 3
    assert not list(rsums)


def many(rank: int, size: int, folder: str, piece, stop: int) -> None:
    def work() -> None:
        training = Loop(TowerTrainer, piece)
        while not training.over and training.epoch < stop:
            training.run_epoch()
        training.settle()
        if training.over:
            training.publish()
        if rank == 0:
            Path(folder, f"{size}.json").write_text(json.dumps(training.step))

    gloo.meet(rank, size, folder, work)


def test_one_two_and_four_workers_take_over_from_each_other(data, tiny_encoder, tmp_path):  # noqa: F811
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.epochs", "3", "--lr", "1e-4")
    fit(recipe, root, "alone")
    piece = train.plan(recipe, root, "relay").pieces[0]
    for stop, size in enumerate((1, 2, 4), 1):
        gloo.together(size, many, str(tmp_path), piece, stop)
        assert json.loads(Path(tmp_path, f"{size}.json").read_text()) == stop * 30
    one, relay = weights(root, "alone"), weights(root, "relay")
    for key in one:
        torch.testing.assert_close(relay[key], one[key], atol=1e-5, rtol=1e-4)


def test_four_workers_that_go_on_end_bit_for_bit_as_four_undisturbed_ones(
    data,  # noqa: F811
    tiny_encoder,
    tmp_path,
):
    """Sums of four differ by rounding with their order, which is that of DDP's buckets."""
    _, root = data
    recipe = recipe_with(tiny_encoder, "--train.epochs", "2")
    for name, stops in {"four-straight": (2,), "four-halted": (1, 2)}.items():
        piece = train.plan(recipe, root, name).pieces[0]
        for stop in stops:
            folder = tmp_path / f"{name}-{stop}"
            folder.mkdir()
            gloo.together(4, many, str(folder), piece, stop)
    one, two = weights(root, "four-halted"), weights(root, "four-straight")
    assert [key for key in two if not torch.equal(one[key], two[key])] == []


def storage_worker(rank: int, size: int, folder: str, piece) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    if rank == 1:  # its disk is another one
        store.write_bytes = lambda uri, content: None
    try:
        Loop(TowerTrainer, piece)
    except InputError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_workers_that_do_not_share_the_storage_are_refused_before_the_first_step(data, tmp_path):  # noqa: F811
    recipe, root = data
    piece = train.plan(recipe, root, "storage").pieces[0]
    gloo.together(2, storage_worker, str(tmp_path), piece)
    for rank in range(2):
        said = Path(tmp_path, f"{rank}.txt").read_text()
        assert "which another worker wrote; --root must be storage that every node" in said
