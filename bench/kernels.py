"""Fused losses in Triton against the passes in torch: time, memory and error, as one table.

    python -m bench.kernels                                        # on a GPU, about a minute
    TRITON_INTERPRET=1 python -m bench.kernels --device cpu        # does it run: tiny lists

S-NDCG, InfoNCE and the Kendall hinge with its gap, forward and backward, both directions of one
score matrix. The errors are those of B = 256 and 512 against float64 (the second one goes over the
grid), the gradient's as a share of its norm; "twice" says whether two runs gave the same bits.

Legend of the shape suffixes: B batch.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator

import torch

from bench.gpu.timing import megabytes, milliseconds
from pipeline.formulas.kernels import fused
from pipeline.formulas.losses import GRADED, both_directions

LOSSES = {
    "smooth_ndcg": ({}, (512, 1024, 2048, 4096, 8192, 16384)),
    "info_nce": ({}, (512, 1024, 2048, 4096, 8192, 16384)),
    "kendall_rank": ({"gap": 0.3}, (512, 1024, 2048, 4096)),
}
LONGEST_IN_TORCH = {"kendall_rank": 2048}  # beyond, a run takes a second
COLUMNS = ["loss", "B", "torch, ms", "MB", "Triton, ms", "MB", "x torch", "loss, off by",
           "gradient, relative L2", "twice"]  # fmt: skip


def tables(device: str | torch.device, sizes: tuple[int, ...] | None = None) -> dict:
    """{title, columns, rows, figures}; without Triton its columns are empty."""
    device = torch.device(device)
    if sizes is None and device.type != "cuda":
        sizes = (24, 40)
    rows, figures = [], {}
    for name, (settings, lengths) in LOSSES.items():
        for size in sizes or lengths:
            work = stepped(name, *batch(name, size, device), **settings)
            row = [name, size, *(None,) * (len(COLUMNS) - 2)]
            if size <= LONGEST_IN_TORCH.get(name, size):
                with in_torch():
                    row[2:4] = milliseconds(work, device), megabytes(work, device)
            if fused.takes(*batch(name, 2, device)):
                row[4:6] = milliseconds(work, device), megabytes(work, device)
                row[6] = row[2] and row[2] / row[4]
                figures[f"triton_{name}_ms_{size}"] = row[4]
                row[9] = all(torch.equal(*pair) for pair in zip(work(), work(), strict=True))
                if size <= 512:
                    row[7:9] = errors(name, size, device, settings)
            rows.append(row)
    title = "fused losses, forward and backward, both ways"
    return {"title": title, "columns": COLUMNS, "rows": rows, "figures": figures}


@contextlib.contextmanager
def in_torch() -> Iterator[None]:
    """As if Triton were not there."""
    kept, fused.kernels = fused.kernels, lambda: None
    try:
        yield
    finally:
        fused.kernels = kept


def batch(name: str, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores_BB, target_BB) as a half-trained model has them."""
    generator = torch.Generator(device=device).manual_seed(0)
    drawn = torch.randn(2, size, size, generator=generator, device=device)
    own_BB = torch.eye(size, dtype=torch.bool, device=device)
    scores_BB = (0.12 * drawn[0] + 0.4 * own_BB).clamp_(-1, 1)
    if name not in GRADED:
        return scores_BB, own_BB
    return scores_BB, (0.05 + 0.15 * drawn[1]).clamp_(0, 1).masked_fill_(own_BB, 1)


def stepped(name: str, scores_BB: torch.Tensor, target_BB: torch.Tensor, **settings):
    """A step's share: the loss both ways and the gradient of the scores."""

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        own = scores_BB.detach().requires_grad_()
        loss = both_directions(name, own, target_BB, **settings)
        loss.backward()
        return loss.detach(), own.grad

    return work


def errors(name: str, size: int, device: torch.device, settings: dict) -> tuple[float, float]:
    """How far value and gradient are from those in float64, the worse of two lengths."""
    worst = 0.0, 0.0
    for length in {min(256, size), size}:
        scores, target = batch(name, length, device)
        loss, gradient = stepped(name, scores, target, **settings)()
        precise = target.double() if name in GRADED else target
        exact = {**settings, "method": "chunked"} if name == "smooth_ndcg" else settings
        value, slope = stepped(name, scores.double(), precise, **exact)()
        apart = (gradient.double() - slope).norm() / slope.norm().clamp(min=1e-30)
        off = float((loss.double() - value).abs()), float(apart)
        worst = max(worst[0], off[0]), max(worst[1], off[1])
    return worst


def shown(cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=int, nargs="*", default=None, help="lengths B")
    options = parser.parse_args()
    began = time.perf_counter()
    table = tables(options.device, tuple(options.sizes) if options.sizes else None)
    print(table["title"])
    cells = [[shown(cell) for cell in row] for row in (table["columns"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
