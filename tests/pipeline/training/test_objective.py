"""What a worker holds of the lists: counted, and what `halftone plan` says of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lists import Simulated, batch_of, captions_of, vectors_of
from jobs.cluster import estimate
from pipeline.formulas.kernels import pairs, smooth_rank, sort
from pipeline.formulas.kernels import rows as kernel_rows
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective
from schemas.settings import LabelSettings, ModelSettings, TrainSettings
from tests.helpers import gloo, live_bytes

LENGTH, WIDTH, EACH = 4096, 64, 3  # of the global batch, of a vector, captions of an image
LOSSES = {"info_nce": {}, "smooth_ndcg": {}}
GB = 1e9


def as_on_a_gpu() -> None:
    """Nothing is done by numba, and a block of lists at once."""
    sort.compiled = pairs.compiled = smooth_rank.compiled = lambda: None
    kernel_rows.CACHE["cpu"] = kernel_rows.CACHE["cuda"]


def settings_of(size: int, rows: int = 64, length: int = LENGTH) -> TrainSettings:
    return TrainSettings(losses=LOSSES, batch_size=length, workers=size, lanes=size, list_rows=rows)


def counted(world: ProcessGroup, settings: TrainSettings) -> tuple[int, int]:
    """Bytes at the peak of a step of the objective, and those that autograd kept at its middle."""
    own = settings.batch_size // world.size
    captions, batch = captions_of([EACH] * own, estimate.DIM), batch_of(own, EACH)
    objective = Objective(settings, LabelSettings(), captions, world)
    vectors = vectors_of(own, WIDTH)
    with live_bytes.Peak() as peak, live_bytes.saved() as kept:
        loss, _ = objective(*vectors, batch, epoch=0)
        for_the_way_back = kept()
        loss.backward()
    return peak.most, for_the_way_back


def planned(settings: TrainSettings, width: int = WIDTH, each: float = EACH) -> float:
    return sum(estimate.worker_bytes(settings, ModelSettings(dim=width), each).values())


def worker(rank: int, size: int, folder: str) -> None:
    as_on_a_gpu()

    def work() -> None:
        torch.save(counted(ProcessGroup(), settings_of(size)), f"{folder}/{rank}.pt")

    gloo.meet(rank, size, folder, work)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_worker_holds_what_is_planned(size, tmp_path):
    """Those of a process group, as many as the machine bears, and one that plays one of eight."""
    if size < 8:
        gloo.together(size, worker, str(tmp_path))
        found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    else:
        gloo.together(1, simulated, size, str(tmp_path))
        found = [torch.load(tmp_path / "simulated.pt")]
    own = LENGTH // size
    for most, kept in found:
        assert most == pytest.approx(planned(settings_of(size)), rel=0.15)
        # Gradients of the vectors alone: of own ones, and of the others' for them.
        assert kept == pytest.approx(2 * 4 * WIDTH * (own + LENGTH), abs=64)


def simulated(rank: int, one: int, size: int, folder: str) -> None:
    as_on_a_gpu()
    torch.set_num_threads(1)
    torch.save(counted(Simulated(size), settings_of(size)), f"{folder}/simulated.pt")


def test_a_worker_that_is_played_holds_what_one_of_a_group_does(tmp_path):
    gloo.together(1, simulated, 4, str(tmp_path))
    gloo.together(4, worker, str(tmp_path))
    played, one_of_four = (torch.load(tmp_path / f) for f in ("simulated.pt", "1.pt"))
    assert played[0] == pytest.approx(one_of_four[0], rel=0.02) and played[1] == one_of_four[1]


def test_lists_of_any_length_fit():
    """Eight workers, CLIP's width of 512, five captions an image."""
    graded = settings_of(8, 0, 32768).model_copy(update={"losses": {"smooth_ndcg": {}}})
    assert planned(graded, 512, 5) < 0.5 * GB
    assert planned(settings_of(8, 0, 131072), 512, 5) < 2 * GB
    # Four times the list takes four times as much, and no sixteen times.
    short, long = (planned(settings_of(8, 0, length), 512, 5) for length in (32768, 131072))
    assert long == pytest.approx(4 * short, rel=0.01)


class NoWaits(TorchDispatchMode):
    """Raises where a value would be read that a device may not have yet."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("each", [1, EACH])
def test_a_step_of_the_objective_never_waits_for_the_device(each):
    settings = TrainSettings(
        losses={"info_nce": {}, "soft_label_kl": {}}, batch_size=64, list_rows=5
    )
    captions, batch = captions_of([each] * 32 + [1] * 32, 8), batch_of(32, each)
    objective = Objective(settings, LabelSettings(), captions, Simulated(2))
    vectors = vectors_of(32, WIDTH)
    with pytest.raises(AssertionError, match="waits"), NoWaits():
        bool(vectors[0].sum() > 0)
    with NoWaits():
        loss, _ = objective(*vectors, batch, epoch=0)
        loss.backward()
    assert vectors[0].grad.abs().sum() > 0
