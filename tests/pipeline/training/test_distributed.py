"""Several workers are one worker: the list of a loss is the global batch."""

import pytest
import torch
import torch.distributed as dist

from pipeline.formulas.losses import LOSSES
from pipeline.labels.caption_vectors import PairVectors
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective, loss_of
from schemas.settings import LabelSettings, TrainSettings
from tests.helpers import gloo

PAIRS, DIM, ENCODER_DIM, CAPTIONS = 16, 6, 5, 3

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
}


class Known:
    """Captions of images 0 … PAIRS-1, as `pipeline.labels.caption_vectors.Captions` holds them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        vectors = torch.randn(PAIRS * CAPTIONS, ENCODER_DIM, generator=generator)
        self.vectors = torch.nn.functional.normalize(vectors, dim=1)

    def of_pairs(self, caption_rows):
        rows = (caption_rows // CAPTIONS * CAPTIONS)[:, None] + torch.arange(CAPTIONS)
        mask = torch.ones_like(rows, dtype=torch.bool)
        return PairVectors(self.vectors[rows], mask, self.vectors[caption_rows])


def loss_and_gradient(losses: dict, rank: int, size: int):
    """The mean loss over workers, and the gradient of shared weights after DDP's average."""
    world = ProcessGroup()
    objective = Objective.__new__(Objective)
    objective.loss = loss_of(TrainSettings(losses=losses, negatives_warmup=0))
    objective.label, objective.world = LabelSettings(), world
    objective.captions = Known()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, PAIRS, DIM, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    mine = slice(rank * PAIRS // size, (rank + 1) * PAIRS // size)
    image_rows = torch.arange(PAIRS) // 2 * 2  # two pairs of every other image
    batch = Batch(
        images=torch.zeros(0),
        words=torch.zeros(0),
        lengths=torch.zeros(0),
        image_rows=image_rows[mine],
        caption_rows=(image_rows * CAPTIONS + torch.arange(PAIRS) % 2)[mine],
    )
    images, texts = (
        torch.nn.functional.normalize(inputs[side, mine] @ weights[side], dim=1) for side in (0, 1)
    )
    loss, _ = objective(images, texts, batch, epoch=1.0)
    loss.backward()
    gradient = weights.grad
    if size > 1:
        dist.all_reduce(gradient)
        gradient /= size
    return float(world.mean(loss.detach())), gradient


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    found = {name: loss_and_gradient(losses, rank, size) for name, losses in CASES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_workers_together_have_the_loss_and_gradient_of_one(size, tmp_path):
    gloo.together(size, worker, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, losses in CASES.items():
        value, gradient = loss_and_gradient(losses, 0, 1)
        assert value > 0 and gradient.abs().max() > 1e-4, f"{name} has nothing to do here"
        for rank in range(size):
            other, other_gradient = found[rank][name]
            assert other == pytest.approx(value, abs=1e-9), name
            torch.testing.assert_close(other_gradient, gradient, atol=1e-9, rtol=1e-7, msg=name)


def gather_worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    row = torch.ones(1, 1, requires_grad=True)
    # Worker 0 weighs the rows by 1 and 10, worker 1 by 2 and 20.
    (ProcessGroup().gather(row)[:, 0] * torch.tensor([1.0, 10.0]) * (rank + 1)).sum().backward()
    torch.save(row.grad, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradient_flows_back_to_the_worker_a_row_came_from(tmp_path):
    gloo.together(2, gather_worker, str(tmp_path))
    assert torch.load(tmp_path / "0.pt").tolist() == [[1.0 + 2.0]]
    assert torch.load(tmp_path / "1.pt").tolist() == [[10.0 + 20.0]]
