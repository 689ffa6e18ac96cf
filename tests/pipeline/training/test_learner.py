"""One optimizer step: in chunks, in other arithmetic, on several workers, again."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import InputError
from pipeline.formulas.losses import LOSSES, info_nce
from pipeline.models import TwoTower
from pipeline.models.convolution import ConvolutionTower
from pipeline.models.gru import GRUTower
from pipeline.models.regions import RegionTower
from pipeline.training import checkpoint, train
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner, NotFinite, compiling, lr_factor
from pipeline.training.learner.arithmetic import Arithmetic
from pipeline.training.trainer import TowerTrainer
from schemas.settings import TrainSettings
from tests.helpers import gloo
from tests.helpers.host_waits import HostWaits
from tests.pipeline.training.test_train import (
    data,  # noqa: F401  (a fixture, and its recipe)
    recipe_with,
)

PAIRS, REGIONS, FEATURES, WORDS = 16, 3, 6, 11
HOW = {"temperature": 0.05, "scored": True}  # of the loss: no score is -inf


def batch_of(start=0, end=PAIRS) -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 5, (PAIRS,), generator=generator)
    rows = slice(start, end)
    return Batch(
        images=torch.randn(PAIRS, REGIONS, FEATURES, generator=generator)[rows],
        words=torch.randint(1, WORDS, (PAIRS, 5), generator=generator)[rows],
        lengths=lengths[rows],
        image_rows=torch.arange(PAIRS)[rows],
        caption_rows=torch.arange(PAIRS)[rows],
    )


class Dropped(nn.Module):
    """A text tower that draws."""

    def __init__(self):
        super().__init__()
        self.tower, self.drop = GRUTower(WORDS, 4, 8), nn.Dropout(0.5)

    def forward(self, words, lengths):
        return self.drop(self.tower(words, lengths))


def model_of(text=lambda: GRUTower(WORDS, 4, 8)) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(RegionTower(FEATURES, 8), text())


class Objective:
    """InfoNCE over the gathered batch."""

    def __init__(self, world: ProcessGroup):
        self.world = world

    def __call__(self, images, texts, batch, epoch):
        rows = self.world.gather(batch.image_rows)
        same = batch.image_rows[:, None] == rows[None, :]
        loss = (
            info_nce(images @ self.world.gather(texts).T, same, **HOW).mean()
            + info_nce(texts @ self.world.gather(images).T, same, **HOW).mean()
        ) / 2
        return loss, {"info_nce": loss}


def learner_of(model=None, **settings) -> Learner:
    world = ProcessGroup()
    settings = {"batch_size": PAIRS, "optimizer": "sgd", "lr": 0.1, "lr_schedule": "constant"} | (
        settings
    )
    return Learner(model or model_of(), Objective(world), TrainSettings(**settings), world, 10)


def weights_after(learner: Learner, steps: int, batch=None) -> dict[str, torch.Tensor]:
    learner.parallel.train()
    for number in range(steps):
        learner.step(batch or batch_of(), number)
    learner.check()
    return copy.deepcopy(learner.model.state_dict())


def assert_close(one: dict, two: dict, tolerance: float) -> None:
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [4, 5, 15])
def test_cached_gradients_are_those_of_the_whole_batch(chunk):
    whole = weights_after(learner_of(), 5)
    assert_close(weights_after(learner_of(chunk=chunk), 5), whole, 1e-6)


def test_a_chunk_draws_the_same_again_when_its_gradient_is_taken():
    """Dropout of the pass without a graph and of the one with it must agree."""
    drawn = []

    class Listening(Dropped):
        def forward(self, words, lengths):
            out = super().forward(words, lengths)
            drawn.append((out != 0).detach())
            return out

    weights_after(learner_of(model_of(Listening), chunk=4), 1)
    without, with_graph = drawn[:4], drawn[4:]
    assert all(torch.equal(a, b) for a, b in zip(without, with_graph, strict=True))
    assert not torch.equal(drawn[0], drawn[1])


def test_cached_gradients_refuse_a_norm_over_the_batch():
    model = TwoTower(ConvolutionTower(4, 8), GRUTower(WORDS, 4, 8))
    with pytest.raises(InputError, match="image.stages.0.1 normalises over the whole"):
        learner_of(model, chunk=4)


def test_a_restored_learner_goes_on_bit_for_bit():
    settings = {"optimizer": "adamw", "ema": 0.9, "weight_decay": 0.1}
    whole = learner_of(model_of(Dropped), **settings)
    expected = weights_after(whole, 6)
    first = learner_of(model_of(Dropped), **settings)
    weights_after(first, 3)
    files, rest = first.state()
    second = learner_of(model_of(Dropped), **settings)
    second.restore(copy.deepcopy(files), rest)
    for number in range(3, 6):
        second.step(batch_of(), number)
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for one, two in zip(whole.averages, second.averages, strict=True):
        assert torch.equal(one, two)


def test_averaged_weights_are_what_is_evaluated_and_kept():
    learner = learner_of(ema=0.5)
    start = {k: v.clone() for k, v in learner.model.state_dict().items()}
    trained = weights_after(learner, 1)
    expected = {k: (start[k] + trained[k]) / 2 for k in start}
    with learner.as_evaluated():
        assert_close(learner.model.state_dict(), expected, 1e-6)
        assert not learner.model.training
    assert_close(learner.model.state_dict(), trained, 0)
    files, _ = learner.state()
    assert_close(files["model"], expected, 1e-6)
    assert_close(files["raw"], trained, 0)


def test_bf16_takes_nearly_the_same_steps():
    whole = weights_after(learner_of(lr=0.01), 3)
    assert_close(weights_after(learner_of(lr=0.01, precision="amp_bf16"), 3), whole, 3e-2)


def test_fp16_leaves_out_steps_beyond_its_range_and_takes_the_others():
    learner = learner_of(lr=0.01, precision="amp_fp16")
    taken, number = 0, 0
    while taken < 3:
        before = learner.model.image.project.weight.clone()
        learner.step(batch_of(), number)
        number += 1
        taken += not torch.equal(before, learner.model.image.project.weight)
    assert_close(learner.model.state_dict(), weights_after(learner_of(lr=0.01), 3), 3e-2)
    _, rest = learner.state()
    assert rest["scaler"]["scale"] == 2.0 ** (16 - (number - taken))


def test_compiled_towers_take_the_same_steps():
    model = TwoTower(RegionTower(FEATURES, 8), Mean())
    whole = weights_after(learner_of(copy.deepcopy(model)), 2)
    assert_close(weights_after(learner_of(model, compile="on"), 2), whole, 1e-6)


class Mean(nn.Module):
    """A text tower that compiles quickly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(WORDS, 8)

    def forward(self, words, lengths):
        return self.embed(words).mean(1)


def test_towers_are_compiled_where_it_pays():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    auto, on = TrainSettings(), TrainSettings(compile=True)  # as recipes of before say it
    assert compiling.wanted(auto, gpu, 2_000) and not compiling.wanted(auto, gpu, 1_999)
    assert not compiling.wanted(auto, cpu, 10**6) and compiling.wanted(on, cpu, 1)
    assert not compiling.wanted(TrainSettings(compile="off"), gpu, 10**6)
    assert TrainSettings(compile=False).compile == "off"


def test_without_a_compiler_a_sentence_says_so_and_training_goes_on(monkeypatch, tmp_path, caplog):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # it has compiled nothing yet
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
    torch._dynamo.reset()
    whole = weights_after(learner_of(), 2)
    assert_close(weights_after(learner_of(compile="on"), 2), whole, 0)
    assert "trained without being compiled: " in caplog.text
    assert "torch.compile fails (" in caplog.text
    torch._dynamo.reset()


# ---- arithmetic --------------------------------------------------------------------------------


def test_weights_are_cast_once_for_all_chunks(monkeypatch):
    """Once for the passes without a graph, once for those with it; the numbers stay the same."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            weight = func is torch.ops.aten._to_copy.default and args[0].shape == (8, FEATURES)
            Casts.count += weight and kwargs.get("dtype") == torch.bfloat16
            return func(*args, **(kwargs or {}))

    def course(steps: int):
        learner = learner_of(precision="amp_bf16", chunk=4, lr=0.01)
        weights_after(learner, 1)
        with Casts():
            learner.step(batch_of(), 1)
        return weights_after(learner, steps)

    kept = course(3)
    assert Casts.count == 2
    monkeypatch.setattr(Arithmetic, "casts_kept", lambda self: contextlib.nullcontext())
    assert_close(course(3), kept, 0)
    assert Casts.count == 2 + 8


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_towers_alone_compute_in_tf32_and_where_it_is_asked_for(precision, chunk, monkeypatch):
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    seen: dict[str, set] = {}

    class Watching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, where):
            ctx.where = where
            seen.setdefault(f"{where}, forward", set()).add(allowed())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.setdefault(f"{ctx.where}, backward", set()).add(allowed())
            return grad, None

    class Watched(GRUTower):
        def forward(self, words, lengths):
            return Watching.apply(super().forward(words, lengths), "towers")

    def objective(self, images, texts, batch, epoch):
        return learn(self, Watching.apply(images, "loss"), texts, batch, epoch)

    learn = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", objective)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as a process group sets it
    learner = learner_of(model_of(lambda: Watched(WORDS, 4, 8)), precision=precision, chunk=chunk)
    weights_after(learner, 1)
    where = {f"{part}, {way}" for part in ("towers", "loss") for way in ("forward", "backward")}
    assert seen.keys() == where and allowed() == (False, False)
    asked = precision == "tf32"
    for part, found in seen.items():
        assert found == {(asked and "towers" in part,) * 2}, part


# ---- no wait for the device --------------------------------------------------------------------

# Places that still read a value, with the reason.
WAITING = {
    "pipeline/formulas/kernels/sort.py": "numpy sorts, on a processor alone",
    "pipeline/training/objective.py": "images' captions are looked up on the host",
    "pipeline/formulas/losses/contrastive.py": "the triplet loss lists the positives it hinges on",
}


def counts(learner: Learner) -> list[torch.Tensor]:
    """An optimizer's counts of its steps, which are on the host where it is not fused."""
    return [slots["step"] for slots in learner.optimizer.state.values() if "step" in slots]


LEARNED = "{info_nce: {temperature: learned}, siglip: {scale: learned, bias: learned}}"


@pytest.mark.parametrize("name", [*LOSSES, "learned"])
def test_a_step_waits_for_no_device(data, tiny_encoder, name):  # noqa: F811
    asked = LEARNED if name == "learned" else f"{{{name}: {{weight: 1}}}}"
    losses = ("--train.losses", asked, "--train.ema", "0.9")
    recipe = recipe_with(tiny_encoder, *losses, "--train.optimizer", "adamw")
    training = TowerTrainer(train.plan(recipe, data[1], f"waits-{name}").pieces[0], ProcessGroup())
    batches = training.batches(0)
    training.step(next(batches), 0)
    training.learner.check()  # a step late, when the device has long been there
    batch = next(batches)
    with HostWaits(batch.lengths, batch.caption_rows, *counts(training.learner)) as waits:
        training.step(batch, 1)
    new = [said for said in waits.found if not any(place in said for place in WAITING)]
    assert not new, "\n".join(new)


def test_the_watch_finds_what_waits():
    known, lengths = torch.randn(6), torch.arange(3)
    with HostWaits(lengths) as waits:
        lengths[1:].tolist(), int(lengths.clone().max()), known.masked_fill_(known > 2, 0)
    assert waits.found == []
    for read in (
        lambda: float(known[0]), lambda: known.tolist(), lambda: known[known > 0], known.nonzero,
        lambda: bool(known[0] > 0), known.cpu, known.numpy, lambda: torch.where(known > 0),
    ):  # fmt: skip
        with HostWaits(lengths) as waits:
            read()
        assert waits.found


@pytest.mark.parametrize("how", [{"chunk": 4}, {"precision": "amp_bf16"}, {"precision": "tf32"}])
def test_nor_does_a_step_in_chunks_or_in_other_arithmetic(how):
    learner = learner_of(**how)
    weights_after(learner, 1)
    batch = batch_of()
    with HostWaits(batch.lengths, *counts(learner)) as waits:
        learner.step(batch, 1)
    assert not waits.found


# ---- when it goes wrong --------------------------------------------------------------------------


def test_the_batch_of_a_step_that_is_not_finite_is_handed_on():
    learner = learner_of()
    bad = batch_of()
    bad.images[0, 0, 0] = float("nan")
    learner.step(batch_of(), 0)
    learner.step(bad, 1)
    with pytest.raises(NotFinite, match="at step 1") as caught:
        learner.step(batch_of(), 2)
    assert caught.value.batch.images[0, 0, 0].isnan()
    with pytest.raises(NotFinite):  # and before a checkpoint, without another step
        learner = learner_of()
        learner.step(bad, 0)
        learner.check()


def test_only_matrices_decay_and_a_tower_scales_its_rate():
    class Slow(RegionTower):
        def lr_scale(self, name):
            return 0.1

    model = TwoTower(Slow(FEATURES, 8), GRUTower(WORDS, 4, 8))
    groups = learner_of(model, weight_decay=0.5).optimizer.param_groups
    found = {(g["lr_scale"], g["weight_decay"], p.ndim) for g in groups for p in g["params"]}
    assert found == {(0.1, 0.5, 2), (0.1, 0.0, 1), (1.0, 0.5, 2), (1.0, 0.0, 1)}


def test_learning_rate_rises_then_follows_its_schedule():
    settings = TrainSettings(epochs=2, lr_warmup=0.5, lr_schedule="cosine")
    factors = [lr_factor(settings, step, 10) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0 and all(a > b for a, b in itertools.pairwise(factors[5:]))
    step = TrainSettings(epochs=3, lr_schedule="step")
    assert [lr_factor(step, k, 10) for k in (0, 19, 20)] == [1.0, 1.0, 0.1]


def worker(rank: int, size: int, folder: str) -> None:
    gloo.meet(rank, size, folder, lambda: take_steps(rank, size, folder))


def take_steps(rank: int, size: int, folder: str) -> None:
    share = PAIRS // size
    batch = batch_of(rank * share, (rank + 1) * share)
    for settings in ({}, {"chunk": 3}, {"sharding": "fsdp"}, {"sharding": "fsdp", "ema": 0.5}):
        learner = learner_of(optimizer="adamw", weight_decay=0.1, lr=0.01, **settings)
        learner.parallel.train()
        for number in range(3):
            learner.step(batch, number)
        files, rest = learner.state()
        files = checkpoint.whole(files, keep=True)
        if rank == 0:
            torch.save(files, f"{folder}/{'-'.join(map(str, settings.values())) or 'ddp'}.pt")
        if settings.get("sharding"):  # and back again, from files that every worker reads
            dist.barrier()
            files = torch.load(f"{folder}/{'-'.join(map(str, settings.values()))}.pt")
            everything = [rest]
            dist.broadcast_object_list(everything)
            other = learner_of(optimizer="adamw", weight_decay=0.1, lr=0.01, **settings)
            other.restore(files, everything[0])
            learner.step(batch, 3)
            other.step(batch, 3)
            for one, two in zip(learner.parameters, other.parameters, strict=True):
                torch.testing.assert_close(one.full_tensor(), two.full_tensor())


def test_two_workers_take_the_steps_of_one_whole_or_sharded_or_in_chunks(tmp_path):
    gloo.together(2, worker, str(tmp_path))
    one = weights_after(learner_of(optimizer="adamw", weight_decay=0.1, lr=0.01), 3)
    for name in ("ddp", "3", "fsdp"):
        assert_close(torch.load(tmp_path / f"{name}.pt")["model"], one, 1e-5)
    averaged = torch.load(tmp_path / "fsdp-0.5.pt")
    assert_close(averaged["raw"], one, 1e-5)
    assert not torch.equal(averaged["model"]["image.project.weight"], one["image.project.weight"])
