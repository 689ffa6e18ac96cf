"""Gradient caching: four times the batch in the same memory, with the same gradient.

    python -m bench.caching

Transformer towers (8 layers, width 256) on 49 patches and 32 words, InfoNCE on the
whole list, one step of SGD. Each way runs in a process of its own, whose highest memory is
told above what it was before the step.
"""

import multiprocessing
import time

import torch
from torch import nn

from bench import peak_memory
from pipeline.models import TwoTower
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner
from pipeline.training.objective import Objective
from schemas.settings import LabelSettings, TrainSettings

WIDTH, LAYERS, PATCHES, WORDS, VOCABULARY, DIM = 256, 8, 49, 32, 5000, 256
WAYS = {"64 whole": (64, 0), "256 in chunks of 64": (256, 64), "256 whole": (256, 0)}


class Transformer(nn.Module):
    """The mean state of a transformer encoder, mapped to DIM."""

    def __init__(self, first: nn.Module):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True)
        self.first, self.encoder = first, nn.TransformerEncoder(layer, LAYERS)
        self.project = nn.Linear(WIDTH, DIM)

    def forward(self, items, lengths=None):
        return self.project(self.encoder(self.first(items)).mean(1))


def batch_of(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randn(size, PATCHES, WIDTH, generator=generator),
        words=torch.randint(VOCABULARY, (size, WORDS), generator=generator),
        lengths=torch.full((size,), WORDS),
        image_rows=torch.arange(size),
        caption_rows=torch.arange(size),
    )


def step(size: int, chunk: int, out: multiprocessing.Queue) -> None:
    """One step; (MB above before, seconds, the weights' change by parameter)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TwoTower(
        Transformer(nn.Linear(WIDTH, WIDTH)), Transformer(nn.Embedding(VOCABULARY, WIDTH))
    )
    settings = TrainSettings(
        batch_size=size,
        chunk=chunk,
        optimizer="sgd",
        momentum=0,
        lr=1.0,
        clip_grad_norm=1e9,
        losses={"info_nce": {"weight": 1.0, "temperature": 0.05}},
    )
    world = ProcessGroup()
    objective = Objective(settings, LabelSettings(), None, world)
    learner = Learner(model, objective, settings, world, 100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, base = batch_of(size), peak_memory.from_here()
    started = time.process_time()
    learner.step(batch, 0)
    learner.check()
    seconds = time.process_time() - started
    peak = peak_memory.peak()
    change = {name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()}
    out.put((peak - base, seconds, change))


def main() -> None:
    changes = {}
    for way, (size, chunk) in WAYS.items():
        out = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=step, args=(size, chunk, out))
        process.start()
        megabytes, seconds, changes[way] = out.get()
        process.join()
        print(f"{way:20} {megabytes:6.0f} MB above before, {seconds:6.1f} CPU s", flush=True)
    whole, chunked = changes["256 whole"], changes["256 in chunks of 64"]
    apart = max(abs(whole[k] - chunked[k]).max() for k in whole)
    largest = max(abs(change).max() for change in whole.values())
    print(
        f"steps of 256 differ by at most {apart:.1e} in a weight; the largest change {largest:.1e}"
    )


if __name__ == "__main__":
    main()
