"""What a training step costs beside the towers: the optimizer, casts to bf16, checkpoints.

    python -m bench.step [MB] [optimizers|casts|checkpoints …]

Everything is a ratio within one run, on the GPU where there is one, else on one core. The model has
MB megabytes of weights (default 100), so with Adam's two moments a checkpoint has three times that.
"""

import contextlib
import statistics
import sys
import tempfile
import time

import torch
from torch import nn

from pipeline.models import TwoTower
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Writer
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner
from schemas.settings import TrainSettings

torch.set_num_threads(1)
PAIRS, WIDTH, WORDS, WARM, ROUNDS = 32, 1024, 1000, 2, 8
KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Layers(nn.Module):
    """A tower of square layers on a vector or on a text's words."""

    def __init__(self, first: nn.Module, layers: int):
        super().__init__()
        square = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(layers)]
        self.first, self.layers = first, nn.ModuleList(square)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def learner_of(megabytes: int, **settings) -> Learner:
    torch.manual_seed(0)
    world, layers = ProcessGroup(), max(1, round(megabytes * 1e6 / 4 / WIDTH**2 / 2))
    image, text = nn.Linear(8, WIDTH), nn.EmbeddingBag(WORDS, WIDTH)
    model = TwoTower(Layers(image, layers), Layers(text, layers))
    settings = TrainSettings(batch_size=PAIRS, optimizer="adamw", **settings)
    return Learner(model, cosine, settings, world, 1000)


def cosine(images, texts, batch, epoch):
    """InfoNCE of one process: next to nothing beside the towers."""
    loss = nn.functional.cross_entropy(images @ texts.T / 0.1, batch.image_rows)
    return loss, {"info_nce": loss}


def batch_of() -> Batch:
    rows = torch.arange(PAIRS)
    words = torch.randint(0, WORDS, (PAIRS, 8))
    return Batch(torch.randn(PAIRS, 8), words, torch.full((PAIRS,), 8), rows, rows)


def seconds(learner: Learner, number: int) -> float:
    """Wall time of a step until the device is done with it."""
    batch, started = batch_of(), time.perf_counter()
    learner.step(batch, number)
    settled()
    return time.perf_counter() - started


def settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def optimizers(megabytes: int) -> None:
    """A step of each optimizer: torch's loop (what a processor takes), and fused."""
    device = ProcessGroup().device
    for name, kind in KINDS.items():
        took = {}
        for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            count = max(1, round(megabytes * 1e6 / 4 / WIDTH**2))
            weights = [torch.ones(WIDTH, WIDTH, device=device) for _ in range(count)]
            for weight in weights:
                weight.grad = torch.full_like(weight, 1e-3)
            momentum = {"momentum": 0.9} if name == "sgd" else {}
            optimizer, found = kind(weights, lr=1e-3, **momentum, **how), []
            for _ in range(WARM + 7):
                settled()
                started = time.perf_counter()
                optimizer.step()
                settled()
                found.append(time.perf_counter() - started)
            took[next(iter(how)) if next(iter(how.values())) else "loop"] = min(found[WARM:])
        loop = took["loop"]
        told = ", ".join(f"{how} {1e3 * t:.1f} ms ({t / loop:.2f})" for how, t in took.items())
        print(f"optimizer {name:<6}{told}")


def casts(megabytes: int) -> None:
    """A bf16 step in eight chunks: weights cast in every pass anew, and once."""
    took: dict[str, list[float]] = {"anew": [], "once": []}
    learner = learner_of(megabytes, precision="amp_bf16", chunk=PAIRS // 8)
    kept = learner.arithmetic.casts_kept
    for number in range(WARM + ROUNDS):
        for name, how in (("anew", contextlib.nullcontext), ("once", kept)):
            learner.arithmetic.casts_kept = how
            took[name].append(seconds(learner, number))
    anew, once = (statistics.median(found[WARM:]) for found in took.values())
    print(
        f"bf16 in chunks: cast anew {1e3 * anew:.0f} ms, once {1e3 * once:.0f} ({once / anew:.2f})"
    )


def checkpoints(megabytes: int) -> None:
    """What a checkpoint holds training up: written at once, and in the background."""
    learner = learner_of(megabytes)
    learner.parallel.train()
    alone = statistics.median([seconds(learner, n) for n in range(WARM + ROUNDS)][WARM:])
    with tempfile.TemporaryDirectory() as folder:
        writer, at_once, held, beside = Writer(folder, learner.world), [], [], []
        for number in range(4):
            started = time.perf_counter()
            files, rest = learner.state()
            checkpoint.write(folder, about(number, rest), checkpoint.whole(files, True), [])
            at_once.append(time.perf_counter() - started)
        for number in range(10, 14):
            started = time.perf_counter()
            files, rest = learner.state()
            writer.begin(about(number, rest), files, [])
            held.append(time.perf_counter() - started)
            while not writer.done():
                beside.append(seconds(learner, number))
            writer.wait()
    wrote, copied, slowed = (statistics.median(found) for found in (at_once, held[1:], beside))
    print(
        f"checkpoint of {3 * megabytes} MB: at once {1e3 * wrote:.0f} ms; in the background held "
        f"up {1e3 * copied:.0f} ms ({copied / wrote:.2f}; the first {1e3 * held[0]:.0f}), then "
        f"{len(beside) / len(held):.1f} steps of {1e3 * slowed:.0f} ms beside it "
        f"({1e3 * alone:.0f} alone)"
    )


def about(step: int, rest: dict) -> dict:
    known = {"fingerprint": "", "epoch": 0, "step": step, "metrics": {}, "records": []}
    known |= {"best": {"step": 0, "epoch": 0}, "optimizer": rest, "settings": {}}
    return known | {"data_version": "", "label_version": None}


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    for measure in (optimizers, casts, checkpoints):
        if measure.__name__ in sys.argv[2:] or not sys.argv[2:]:
            measure(size)
