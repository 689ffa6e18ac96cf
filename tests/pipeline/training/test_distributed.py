"""Several workers are one worker: the list of a loss is the global batch."""

import itertools
from pathlib import Path

import pytest
import torch

from bench.lists import captions_of
from pipeline.formulas.losses import LOSSES, Learned
from pipeline.labels.caption_vectors import Captions
from pipeline.training import distributed
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective, loss_of
from schemas.settings import LabelSettings, TrainSettings
from tests.helpers import gloo

PAIRS, DIM, ENCODER_DIM = 16, 6, 5

# Every loss on its own, with settings under which these few pairs give it something to do.
SETTINGS = {
    "smooth_ndcg": {"tau": 0.1},
    "kendall_rank": {"gap": 0.05, "margin": 0.1},
    "kendall_smooth": {"tau": 0.1},
    "masked_info_nce": {"ignore_above": 0.3},
}
CASES = {name: {name: SETTINGS.get(name, {})} for name in LOSSES} | {
    "windows": {"kendall_rank": {"window": 3, "hardest": 5}},
    "all and soft negatives": {"triplet": {"negatives": "soft", "mining": 0.5}},
    "scheduled sum": {
        "info_nce": {"weight": 0.3, "temperature": {"from": 0.5, "to": 0.1, "over": 4}},
        "smooth_ndcg": {"weight": {"from": 0, "to": 4, "over": 2}, "tau": 0.05},
    },
    "learned": {
        "info_nce": {"temperature": "learned"},
        "adaptive_info_nce": {"temperature": {"learned": 0.2}},
        "siglip": {"scale": "learned", "bias": {"learned": -3}},
        "smooth_ndcg": {"tau": {"follows": "info_nce"}},
    },
}


# They ask what order or equals relevance has; an image that is there twice ties but for rounding.
TIED = {"kendall_rank", "kendall_smooth", "list_mle"}


def inputs_of(captions: Captions, mine: slice, losses: dict):
    """Shared weights, the vectors of images and texts that follow from them, and the batch."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, PAIRS, DIM, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    image_rows = torch.arange(PAIRS)
    if not TIED & set(losses):
        image_rows = image_rows // 2 * 2  # two pairs of every other image
    first = torch.from_numpy(captions.first)[image_rows]
    # Two of its captions, or one twice where there is no other.
    second = torch.arange(PAIRS) % 2 * (torch.from_numpy(captions.count)[image_rows] > 1)
    batch = Batch(
        images=torch.zeros(0),
        words=torch.zeros(0),
        lengths=torch.zeros(0),
        image_rows=image_rows[mine],
        caption_rows=(first + second)[mine],
    )
    vectors = [
        torch.nn.functional.normalize(inputs[side, mine] @ weights[side], dim=1) for side in (0, 1)
    ]
    return weights, vectors, batch


def whole(losses: dict, counts: list[int], label: LabelSettings):
    """Loss, terms and gradient by the score matrix and the relevance of all captions."""
    captions = captions_of(counts, ENCODER_DIM)
    weights, (images, texts), batch = inputs_of(captions, slice(None), losses)
    learned = Learned(losses)
    parameters = {k: torch.tensor(v, requires_grad=True) for k, v in learned.starts.items()}
    values = learned.values(parameters)
    loss = loss_of(TrainSettings(losses=losses, negatives_warmup=0)).having(values)
    r_MN = captions.relevance(captions.image_ids, label)
    r_BB = r_MN[batch.image_rows][:, batch.caption_rows]
    same_BB = batch.image_rows[:, None] == batch.image_rows
    i2t = loss.terms(images @ texts.T, same_BB, r_BB, time=1.0)
    t2i = loss.terms(texts @ images.T, same_BB, r_BB.T, time=1.0)
    terms = {name: (i2t[name].mean() + t2i[name].mean()) / 2 for name in i2t}
    total = sum(terms.values())
    total.backward()
    terms |= learned.told(values)
    found = {"": total.item()} | {k: v.item() for k, v in terms.items()}
    return found, weights.grad, {k: p.grad for k, p in parameters.items()}


def shared(losses: dict, counts: list[int], label: LabelSettings, rows: int, rank=0, size=1):
    """The same of the objective on `size` workers, gradients after DDP's average."""
    world, captions = ProcessGroup(), captions_of(counts, ENCODER_DIM)
    settings = TrainSettings(losses=losses, negatives_warmup=0, list_rows=rows)
    objective = Objective(settings, label, captions, world)
    mine = slice(rank * PAIRS // size, (rank + 1) * PAIRS // size)
    weights, vectors, batch = inputs_of(captions, mine, losses)
    loss, terms = objective(*vectors, batch, epoch=1.0)
    loss.backward()
    terms = {"": loss, **terms}
    return (
        {name: float(world.mean(value.detach())) for name, value in terms.items()},
        world.mean(weights.grad),
        {k: world.mean(p.grad) for k, p in objective.parameters.items()},
    )


# Where an image comes twice it is with two captions: equal relevance would tie by rounding alone.
RAGGED, ONE = [2, 3, 3, 2, 5, 1, 3, 1, 2, 4, 2, 1, 3, 2, 2, 1], [1] * PAIRS


def cases(folder: str) -> dict[tuple, tuple]:
    """(losses, captions of each image, label) by what they try."""
    decided = f"{folder}/decided.csv"
    Path(decided).write_text(
        "image_id,caption_id,relevance\n0,4#1,0.25\n4,0#0,0.75\n8,8#0,0.5\n2,8#0,0.9\n9,0#0,0.1\n"
    )
    graded, knots = CASES["scheduled sum"], f"{folder}/map.json"
    Path(knots).write_text('{"map": "isotonic", "knots": [-0.5, 0.1, 0.9], "values": [0, 0.3, 1]}')
    labels = {
        "as it is": LabelSettings(),
        "mean": LabelSettings(reduce="mean"),
        "fitted": LabelSettings(map="isotonic", calibration=knots),
        "decided": LabelSettings(overrides=decided),
    }
    every = {
        ("ragged", name): (losses, RAGGED, labels["as it is"]) for name, losses in CASES.items()
    }
    for name, counts in (("ragged", RAGGED), ("one caption", ONE)):
        every |= {(name, how): (graded, counts, label) for how, label in labels.items()}
    return every


def worker(rank: int, size: int, folder: str) -> None:
    def work() -> None:
        found = {
            (case, rows): shared(*given, rows, rank, size)
            for case, given in cases(folder).items()
            for rows in (0, 3)
        }
        torch.save(found, f"{folder}/{rank}.pt")

    gloo.meet(rank, size, folder, work)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_workers_together_have_the_loss_and_gradient_of_one(size, tmp_path):
    """Whole or by blocks of three lists, whoever has the captions that relevance is made of.

    To what float32 relevance is rounded by, which depends on a product's shape.
    """
    if size == 1:
        worker(0, 1, str(tmp_path))
    else:
        gloo.together(size, worker, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for case, given in cases(str(tmp_path)).items():
        expected, gradient, of_learned = whole(*given)
        assert expected[""] > 0 and gradient.abs().max() > 1e-4, f"{case} has nothing to do here"
        for rank, rows in itertools.product(range(size), (0, 3)):
            terms, other_gradient, of_own = found[rank][case, rows]
            assert terms == pytest.approx(expected, rel=1e-6, abs=1e-7), (case, rows)
            torch.testing.assert_close(
                other_gradient, gradient, atol=1e-7, rtol=1e-6, msg=str((case, rows))
            )
            assert {k: float(g) for k, g in of_own.items()} == pytest.approx(
                {k: float(g) for k, g in of_learned.items()}, rel=1e-6
            )
            assert 0 not in of_learned.values()


def gather_worker(rank: int, size: int, folder: str, lacking: bool) -> None:
    def work() -> None:
        if lacking:  # as a backend says it that has none

            def none(*given):
                raise RuntimeError("the backend does not support reduce_scatter")

            distributed._reduce_scatter = none
        row = torch.ones(1, 1, requires_grad=True)
        # Worker 0 weighs the rows by 1 and 10, worker 1 by 2 and 20.
        weighed = ProcessGroup().gather(row)[:, 0] * torch.tensor([1.0, 10.0]) * (rank + 1)
        weighed.sum().backward()
        parts = torch.tensor([[rank, 0], [rank, 1]])  # for whom it is stands second
        torch.save((row.grad, ProcessGroup().exchange(parts)), f"{folder}/{rank}.pt")

    gloo.meet(rank, size, folder, work)


@pytest.mark.parametrize("lacking", [False, True])
def test_gradients_and_parts_go_to_the_worker_they_are_for(tmp_path, lacking):
    gloo.together(2, gather_worker, str(tmp_path), lacking)
    (first, to_first), (second, to_second) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert first.tolist() == [[1.0 + 2.0]] and second.tolist() == [[10.0 + 20.0]]
    assert to_first.tolist() == [[0, 0], [1, 0]] and to_second.tolist() == [[0, 1], [1, 1]]
    alone = torch.eye(2)[None]
    assert ProcessGroup().exchange(alone) is alone
