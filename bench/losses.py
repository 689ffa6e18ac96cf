"""Speed, memory and error of the losses and metrics, as ratios within one run on one core.

    python -m bench.losses                 # everything, about six minutes
    python -m bench.losses ndcg large      # some sections of: error ndcg large kendall tau streamed

Forward and backward, both directions, CPU seconds (best of a few), against plain restatements of
what public code computes; those are written here from the formulas. Memory is the peak of the
process above its inputs, gradients included.

Legend of the shape suffixes: B batch, N candidates, D embedding width.
"""

import contextlib
import importlib.util
import itertools
import os
import resource
import sys
import time

import torch

from bench import peak_memory
from pipeline.formulas.kernels import pairs, sort
from pipeline.formulas.kernels.smooth_rank import smooth_rank
from pipeline.formulas.losses import both_directions, kendall_rank, smooth_ndcg, triplet
from pipeline.formulas.metrics import kendall_tau
from pipeline.formulas.streaming import both_directions_streamed

torch.set_num_threads(1)
TAU = 0.01


def batch(size, width=1024):
    """image_BD, text_BD, scores_BB and relevance_BB as a half-trained model has them."""
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(size, width, generator=generator)
    text_BD = image_BD + torch.randn(size, width, generator=generator)
    image_BD = torch.nn.functional.normalize(image_BD, dim=1)
    text_BD = torch.nn.functional.normalize(text_BD, dim=1)
    scores_BB = image_BD @ text_BD.T
    relevance_BB = torch.empty(size, size).normal_(0.05, 0.15, generator=generator).clamp_(0, 1)
    scores_BB += torch.empty(size, size).normal_(0, 0.1, generator=generator)
    relevance_BB.fill_diagonal_(1)
    return image_BD, text_BD, scores_BB, relevance_BB


def seconds(work, times=3):
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def step(loss, scores_BB, target_BB, **settings):
    """One training step's share: the loss both ways and its gradient."""

    def work():
        scores = scores_BB.detach().requires_grad_()
        both_directions(loss, scores, target_BB, **settings).backward()
        return scores.grad

    return work


def alone(work_of):
    """(result, peak MB above the inputs) of a function made and run in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        work = work_of()
        start = peak_memory.from_here()
        result = work()
        peak = peak_memory.peak() - start
        value = result if isinstance(result, float) else 0.0
        os.write(writer, f"{value} {peak}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        return float("nan"), float("nan")
    value, peak = text.split()
    return float(value), float(peak)


@contextlib.contextmanager
def torch_alone(alone=True):
    """As if numba were not installed."""
    kept = sort.compiled
    if alone:
        sort.compiled = pairs.compiled = lambda: None
    yield
    sort.compiled = pairs.compiled = kept


def table(title, rows):
    print(f"\n{title}")
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(str(cell).rjust(w) for cell, w in zip(row, widths, strict=True)))


# What public code does, restated


def cube_ndcg(scores_BB, relevance_BB):
    """Like for like: soft ranks and the ranks by relevance, each from a B x B x B tensor."""
    soft = torch.sigmoid((scores_BB[:, None, :] - scores_BB[:, :, None]) / TAU)
    rank_BB = 0.5 + soft.sum(-1)
    with torch.no_grad():
        ideal = 1.0 + (relevance_BB[:, None, :] > relevance_BB[:, :, None]).float().sum(-1)
    gain_BB = torch.exp2(relevance_BB) - 1
    best_B = (gain_BB / torch.log2(1 + ideal)).sum(-1)
    return 1 - (gain_BB / torch.log2(1 + rank_BB)).sum(-1) / best_B


def public_ndcg(scores_BB, relevance_BB):
    """The public module's whole computation.

    Repeated operands, a stored mask without the diagonal, the step spelled out with a clamped
    exponent, and hard ranks for its log besides.
    """
    size = len(scores_BB)
    others = (1 - torch.eye(size)).repeat(size, 1, 1)

    def ranks(x_BB, tau):
        rows = x_BB.unsqueeze(1).repeat(1, size, 1)
        difference = rows - rows.permute(0, 2, 1)
        if tau is None:
            return ((difference > 0).float() * others).sum(-1) + 1
        exponent = torch.clamp(-difference / tau, min=-50, max=50)
        return (1.0 / (1.0 + torch.exp(exponent)) * others).sum(-1) + 1

    gain_BB = torch.pow(2.0, relevance_BB) - 1
    ideal_B = (gain_BB / torch.log2(1 + ranks(relevance_BB, None))).sum(-1)
    hard_B = (gain_BB / torch.log2(1 + ranks(scores_BB.detach(), None))).sum(-1) / ideal_B
    smooth_B = (gain_BB / torch.log2(1 + ranks(scores_BB, TAU))).sum(-1) / ideal_B
    return 1 - smooth_B + 0 * hard_B


def allrank_style(scores_BB, relevance_BB):
    """ApproxNDCG over pairs of candidates sorted by score, differences of padded pairs masked."""
    sorted_BB, order_BB = scores_BB.sort(descending=True, dim=-1)
    true_BB = relevance_BB.gather(1, order_BB).clamp(min=0)
    difference = sorted_BB[:, :, None] - sorted_BB[:, None, :]
    difference = torch.where(torch.isfinite(difference), difference, 0.0)
    place_BB = 1 + (
        torch.sigmoid(-difference / TAU).clamp(min=1e-10) * (1 - torch.eye(len(scores_BB)))
    ).sum(-1)
    ideal_BB = relevance_BB.sort(descending=True, dim=-1).values
    discount = torch.log2(1.0 + torch.arange(1, ideal_BB.shape[1] + 1))
    best_B = ((torch.pow(2, ideal_BB) - 1) / discount).sum(-1).clamp(min=1e-10)
    return 1 - ((torch.pow(2, true_BB) - 1) / torch.log2(1 + place_BB)).sum(-1) / best_B


def rax_style(scores_BB, relevance_BB):
    """ApproxNDCG with smooth ranks summed over masked pairs, ideal ranks from a sort."""
    others = torch.ones(scores_BB.shape, dtype=torch.bool)[:, :, None] & ~torch.eye(
        len(scores_BB), dtype=torch.bool
    )
    above = torch.sigmoid((scores_BB[:, None, :] - scores_BB[:, :, None]) / TAU)
    place_BB = 1 + torch.where(others, above, 0.0).sum(-1)
    gain_BB = torch.exp2(relevance_BB) - 1
    ideal_BB = gain_BB.sort(descending=True, dim=-1).values
    best_B = (ideal_BB / torch.log2(2.0 + torch.arange(ideal_BB.shape[1]))).sum(-1)
    return 1 - (gain_BB / torch.log2(1 + place_BB)).sum(-1) / best_B


def cube_kendall(scores_BB, relevance_BB):
    ordered = (relevance_BB[:, :, None] - relevance_BB[:, None, :] > 0.3).float()
    hinge = torch.clamp(scores_BB[:, None, :] - scores_BB[:, :, None], min=0)
    return (hinge * ordered).sum((1, 2)) / ordered.sum((1, 2)).clamp(min=1)


# Sections


def error():
    """The binned rank and gradient against the exact ones."""
    rows = [("tau", "cells/tau", "rank, float64", "rank, float32", "gradient, float32")]
    _, _, scores, _ = batch(512, 64)
    scores = scores[:32]
    weight = torch.rand(scores.shape, generator=torch.manual_seed(1))
    for tau in (1e-3, 1e-2, 1e-1):
        precise = scores.double().requires_grad_()
        exact = smooth_rank(precise, tau=tau, method="chunked")
        (slope,) = torch.autograd.grad((exact * weight).sum(), precise)
        for cells, bound in ((3, 4e-5), (4, 1.2e-5), (8, 8e-7)):
            in_double = smooth_rank(scores.double(), tau=tau, method="binned", error=bound)
            own = scores.clone().requires_grad_()
            binned = smooth_rank(own, tau=tau, method="binned", error=bound)
            (found,) = torch.autograd.grad((binned * weight).sum(), own)
            worst = [((x - exact).abs() / exact).max().item() for x in (in_double, binned)]
            worst.append(((found - slope).abs().max() / slope.abs().max()).item())
            rows.append((tau, cells, *(f"{x:.1e}" for x in worst)))
    table(
        "error of the binned smooth rank, N = 512, relative (gradient: to its largest entry)", rows
    )


def ndcg():
    """S-NDCG at B = 512 against dense forms."""
    _, _, scores, relevance = batch(512)
    forms = [
        ("public module restated", public_ndcg, {}),
        ("like for like, dense", cube_ndcg, {}),
        ("allRank style, dense", allrank_style, {}),
        ("rax style, dense", rax_style, {}),
        ("ours, chunked (exact)", smooth_ndcg, {"method": "chunked"}),
        *((f"ours, {name}", smooth_ndcg, {"method": method}) for name, method in grids()),
    ]
    measured, rows = [], [("S-NDCG, B = 512", "ms", "x like for like", "x public", "extra MB")]
    for name, form, settings in forms:

        def fresh(form=form, settings=settings):
            ours = form is smooth_ndcg
            _, _, few, labels = batch(256 if ours else 32, 64)
            step(form, few, labels, **settings)()  # code is loaded and compiled before the clock
            work = step(form, scores, relevance, **settings)
            return lambda: seconds(work, 7 if ours else 1)

        measured.append((name, *alone(fresh)))
    public, dense = measured[0][1], measured[1][1]
    for name, t, peak in measured:
        ratios = f"{dense / t:.0f}", f"{public / t:.0f}"
        rows.append((name, f"{1e3 * t:.1f}", *ratios, f"{peak:.0f}"))
    table("S-NDCG", rows)


def grids():
    yield "binned, torch alone", "binned"
    if importlib.util.find_spec("numba"):
        yield "binned, numba", "fast"


def large():
    """S-NDCG at B = 4,096 against the matrix products around it, at 16,384, and on a bank.

    Times are the best of rounds that go through all of it: a busy machine is busy for all alike.
    """
    image, text, scores, relevance = batch(4096)
    own = torch.eye(4096, dtype=torch.bool)
    rows = [("B = 4,096, D = 1,024", "s", "x products", "with them", "extra MB", "x scores")]
    forms = {f"S-NDCG, {name}": (smooth_ndcg, relevance, {"method": m}) for name, m in grids()}
    forms["triplet, hardest"] = triplet, own, {}
    for name, _ in grids():
        forms[f"SW-HS, {name}"] = kendall_rank, relevance, {"window": 16, "hardest": 64}
    times, products = dict.fromkeys(forms, float("inf")), float("inf")
    for _ in range(5):
        products = min(products, three_products(image, text))
        for name, (loss, target, settings) in forms.items():
            with torch_alone("torch" in name):
                took = seconds(step(loss, scores, target, **settings), 1)
            times[name] = min(times[name], took)
    del image, text
    rows.append(("the three products", f"{products:.2f}", "1.00", "", "", ""))
    for name, (loss, target, settings) in forms.items():
        with torch_alone("torch" in name):
            work = step(loss, scores, target, **settings)
            _, peak = alone(lambda work=work: work)
        ratios = f"{times[name] / products:.2f}", f"{1 + times[name] / products:.2f}"
        rows.append((name, f"{times[name]:.2f}", *ratios, f"{peak:.0f}", f"{peak / 64:.1f}"))
    table("large batches", rows)
    for name in forms:
        if "SW-HS" in name:
            print(f"  {name} / triplet: {times[name] / times['triplet, hardest']:.1f}")
    del scores, relevance, own, forms, target, work

    def sixteen():
        _, _, scores, relevance = batch(16384, 64)
        return lambda: seconds(step(smooth_ndcg, scores, relevance), 1)

    t, peak = alone(sixteen)
    print(f"  B = 16,384: {t:.0f} s, {peak:.0f} MB beyond scores and relevance")

    def bank():
        generator = torch.manual_seed(0)
        scores = torch.empty(512, 65536).normal_(0, 0.15, generator=generator).requires_grad_()
        relevance = torch.rand(512, 65536, generator=generator)
        return lambda: seconds(lambda: smooth_ndcg(scores, relevance).mean().backward(), 1)

    t, peak = alone(bank)
    print(f"  512 queries x bank of 65,536: {t:.1f} s, {peak:.0f} MB beyond scores and relevance")


def three_products(image, text):
    gradient = torch.randn(len(image), len(text))
    return seconds(lambda: (image @ text.T, gradient @ text, gradient.T @ image), 1)


def kendall():
    """The Kendall hinge at B = 512."""
    _, _, scores, relevance = batch(512)
    dense = seconds(step(cube_kendall, scores, relevance), 1)
    rows = [("Kendall, B = 512", "ms", "x dense"), ("dense restated", f"{1e3 * dense:.0f}", "1")]
    forms = {"gap 0.3": {"gap": 0.3}, "no gap": {"gap": 0.0}, "SW-HS, w 16": {"window": 16}}
    for name, settings in forms.items():
        t = seconds(step(kendall_rank, scores, relevance, **settings), 5)
        rows.append((f"ours, {name}", f"{1e3 * t:.1f}", f"{dense / t:.0f}"))
    table("Kendall hinge", rows)


def tau():
    """Exact tau_b against scipy's per-row loop, and torchmetrics where it is installed."""
    from scipy.stats import kendalltau

    try:
        from torchmetrics.functional.regression import kendall_rank_corrcoef
    except ImportError:
        kendall_rank_corrcoef = None
    rows = [("n", "type", "ours, us a row", "x scipy", "torch alone, x scipy", "x torchmetrics")]
    sizes = ((10, 500), (100, 300), (1000, 100), (2000, 50), (5000, 20), (25000, 8))
    for (n, count), kind in itertools.product(sizes, (torch.float32, torch.float64)):
        generator = torch.manual_seed(n)
        scores = torch.randn(count, n, generator=generator, dtype=kind)
        relevance = torch.rand(count, n, generator=generator, dtype=kind).mul(100).round().div(100)
        rows = list(zip(scores.numpy(), relevance.numpy(), strict=True))
        best = dict.fromkeys(("ours", "torch alone", "scipy"), float("inf"))
        for _ in range(5):
            best["scipy"] = min(
                best["scipy"], seconds(lambda rows=rows: [kendalltau(*row) for row in rows], 1)
            )
            for name in ("ours", "torch alone"):
                with torch_alone(name != "ours"):
                    took = seconds(lambda s=scores, r=relevance: kendall_tau(s, r), 2)
                best[name] = min(best[name], took)
        others = ""
        if kendall_rank_corrcoef is not None and n <= 1000 and kind == torch.float32:
            some = min(count, 20)
            work = lambda s=scores[:some].T, r=relevance[:some].T: kendall_rank_corrcoef(s, r)  # noqa: E731
            others = f"{seconds(work, 1) / some / best['ours'] * count:.0f}"
        ratios = (f"{best['scipy'] / best[name]:.1f}" for name in ("ours", "torch alone"))
        rows.append((n, str(kind)[6:], f"{1e6 * best['ours'] / count:.0f}", *ratios, others))
    table("exact Kendall tau_b with ties", rows)


def streamed():
    """S-NDCG at B = 32,768 without the score matrix; relevance is computed block by block."""

    def work_of(size=32768, width=64):
        generator = torch.manual_seed(0)
        image = torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=1)
        text = torch.nn.functional.normalize(
            image + torch.randn(size, width, generator=generator) / 9, dim=1
        )
        image, text = image.requires_grad_(), text.requires_grad_()
        labels = torch.nn.functional.normalize(torch.randn(size, 16, generator=generator), dim=1)

        def relevance(rows, columns):
            return (labels[rows] @ labels[columns].T).clamp_(0, 1)

        return lambda: seconds(
            lambda: both_directions_streamed(smooth_ndcg, image, text, relevance).backward(), 1
        )

    t, peak = alone(work_of)
    print(f"\nstreamed S-NDCG, B = 32,768, D = 64: {t:.0f} s, {peak:.0f} MB beyond the embeddings")


SECTIONS = {
    "error": error,
    "ndcg": ndcg,
    "large": large,
    "kendall": kendall,
    "tau": tau,
    "streamed": streamed,
}


def main(names):
    start = time.time()
    for name in names or SECTIONS:
        SECTIONS[name]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{time.time() - start:.0f} s, one core, torch {torch.__version__}, {peak:.1f} GB at most"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
