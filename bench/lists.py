"""The lists of a global batch on one of eight workers: relevance whole and sent, against blocks.

    python -m bench.lists                  # global batches of 4,096, 8,192 and 16,384 pairs
    python -m bench.lists 2048 65536       # of other lengths

S-NDCG of a worker's share against the whole batch, forward and backward, width 512, five captions
of width 384 an image. One process plays one of the workers: what the others send is copies of its
own. `whole` gathers the relevance of the whole batch, of which a worker needs its rows and columns,
and differentiates both directions at once, as was done before; `blocks` is the objective. Each runs
in a process of its own, on one thread; memory is the highest above what was held before the step.
"""

import multiprocessing
import sys
import time

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from bench import peak_memory
from pipeline.formulas.relevance import from_captions
from pipeline.labels.caption_vectors import Captions
from pipeline.storage.vector_columns import vector_column
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective
from schemas.settings import LabelSettings, TrainSettings

SIZE, WIDTH, CAPTIONS, CAPTION_WIDTH = 8, 512, 5, 384
LENGTHS = (4096, 8192, 16384)
SETTINGS = TrainSettings(losses={"smooth_ndcg": {"weight": 1.0}})


class Simulated(ProcessGroup):
    """The first of `size` workers that all have what this one has."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return _Copies.apply(rows, self.size)

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        return parts[:1].expand_as(parts).clone()


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, size):
        ctx.size = size
        return rows.repeat(size, *[1] * (rows.dim() - 1))

    @staticmethod
    def backward(ctx, grad):
        return grad[: len(grad) // ctx.size] * ctx.size, None


def captions_of(counts: list[int], width: int) -> Captions:
    """Random caption vectors of images that have so many."""
    of = np.repeat(np.arange(len(counts)), counts)
    vectors = np.random.default_rng(1).normal(size=(len(of), width)).astype(np.float16)
    columns = {
        "caption_id": [f"{image}#{n}" for n, image in enumerate(of)],
        "image_id": [str(image) for image in of],
        "vector": vector_column(vectors),
    }
    return Captions(pa.table(columns))


def batch_of(pairs: int, each: int) -> Batch:
    """Every image with its first caption."""
    nothing, rows = torch.zeros(pairs, 0), torch.arange(pairs)
    return Batch(nothing, nothing, nothing, image_rows=rows, caption_rows=rows * each)


def vectors_of(pairs: int, width: int) -> list[torch.Tensor]:
    """Images' and texts', as a half-trained model has them."""
    generator = torch.manual_seed(0)
    images = F.normalize(torch.randn(pairs, width, generator=generator), dim=1)
    texts = F.normalize(images + torch.randn(pairs, width, generator=generator) / 9, dim=1)
    return [images.requires_grad_(), texts.requires_grad_()]


def whole(objective: Objective, images_nD, texts_nD, batch: Batch):
    """Loss by score matrices and the relevance of the whole batch on every worker."""
    world, captions = objective.world, objective.relevance.captions
    images_BD, texts_BD = world.gather(images_nD), world.gather(texts_nD)
    same_nB = batch.image_rows[:, None] == world.gather(batch.image_rows)[None]
    images_nCE, mask_nC, texts_nE = captions.of_pairs(batch.caption_rows)
    masks = {"mask_MC": mask_nC, "same_image_MN": same_nB}
    r_nB = from_captions(images_nCE, world.gather(texts_nE), **masks)
    r_BB = torch.cat([r_nB.clone() for _ in range(world.size)])  # received, then put together
    own_Bn = r_BB[:, : len(images_nD)]
    i2t = objective.loss(images_nD @ texts_BD.T, same_nB, r_nB, scored=True)
    t2i = objective.loss(texts_nD @ images_BD.T, same_nB, own_Bn.T, scored=True)
    return (i2t.mean() + t2i.mean()) / 2


def step(way: str, length: int, out: multiprocessing.Queue) -> None:
    """One step; (MB above before, CPU seconds, loss, gradient)."""
    torch.set_num_threads(1)
    pairs = length // SIZE
    captions, batch = captions_of([CAPTIONS] * pairs, CAPTION_WIDTH), batch_of(pairs, CAPTIONS)
    objective = Objective(SETTINGS, LabelSettings(), captions, Simulated(SIZE))
    vectors = vectors_of(pairs, WIDTH)
    base, started = peak_memory.from_here(), time.process_time()
    loss = (
        whole(objective, *vectors, batch)
        if way == "whole"
        else objective(*vectors, batch, epoch=0)[0]
    )
    loss.backward()
    seconds, peak = time.process_time() - started, peak_memory.peak()
    out.put((peak - base, seconds, loss.item(), vectors[0].grad.numpy()))


def main(lengths: list[int]) -> None:
    for length in lengths:
        found = {}
        for way in ("whole", "blocks"):
            out = multiprocessing.get_context("spawn").Queue()
            work = multiprocessing.get_context("spawn").Process(
                target=step, args=(way, length, out)
            )
            work.start()
            megabytes, seconds, loss, gradient = out.get()
            work.join()
            found[way] = loss, gradient
            print(f"{length:7,} {way:7} {megabytes:7,.0f} MB {seconds:6.1f} CPU s", flush=True)
        (loss, gradient), (other, others) = found.values()
        apart = abs(gradient - others).max() / abs(gradient).max()
        print(f"        losses {abs(loss - other):.1e} apart, gradients {apart:.1e} of the largest")


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]] or list(LENGTHS))
