"""Losses on the device: right, how fast, and in how much memory. Needs torch alone.

Legend of the shape suffixes: B batch, D embedding width, E width of caption vectors.
"""

import torch

from bench.gpu.timing import megabytes, milliseconds, wait
from pipeline.formulas.losses import GRADED, LOSSES, both_directions
from pipeline.formulas.streaming import both_directions_streamed

TAU = 0.01
OTHERS = (  # the other losses of a large batch, with the settings that make a difference
    ("triplet", {}),
    ("soft_label_kl", {}),
    ("list_mle", {}),
    ("kendall_rank", {"window": 16, "hardest": 64}),
    ("kendall_rank", {"gap": 0.3}),
)


def batch(size: int, device: torch.device, width: int = 1024) -> tuple[torch.Tensor, ...]:
    """image_BD, text_BD, scores_BB and relevance_BB as a half-trained model has them."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    image_BD = normal(size, width)
    text_BD = image_BD + normal(size, width)
    image_BD, text_BD = (torch.nn.functional.normalize(x, dim=1) for x in (image_BD, text_BD))
    scores_BB = image_BD @ text_BD.T + 0.1 * normal(size, size)
    relevance_BB = (0.05 + 0.15 * normal(size, size)).clamp_(0, 1).fill_diagonal_(1)
    return image_BD, text_BD, scores_BB, relevance_BB


def stepped(loss: str, scores_BB, target_BB, **settings):
    """A step's share: the loss both ways and the gradient of the scores."""

    def work() -> torch.Tensor:
        scores = scores_BB.detach().requires_grad_()
        both_directions(loss, scores, target_BB, **settings).backward()
        return scores.grad

    return work


def correct(device: torch.device, quick: bool) -> dict:
    """Every loss in float32 on the device against float64 on the CPU."""
    rows, worst = [], 0.0
    for size in (16,) if quick else (64, 300):
        _, _, scores, relevance = batch(size, device, 64)
        for name in LOSSES:
            graded = name in GRADED
            target = relevance if graded else relevance > 0.999
            exact = target.double().cpu() if graded else target.cpu()
            found = []
            for s, t in ((scores, target), (scores.double().cpu(), exact)):
                leaf = s.detach().clone().requires_grad_()
                value = both_directions(name, leaf, t)
                value.backward()
                found.append((value.item(), leaf.grad.double().cpu()))
            (value, gradient), (value64, gradient64) = found
            apart = (gradient - gradient64).norm() / gradient64.norm().clamp(min=1e-30)
            again = stepped(name, scores, target)
            same = torch.equal(again(), again())
            worst = max(worst, float(apart))
            rows.append([size, name, abs(value - value64), float(apart), same])
    return {
        "title": "losses in fp32 on the device against float64 on the CPU",
        "columns": ["B", "loss", "loss, off by", "gradient, relative L2", "bitwise twice"],
        "rows": rows,
        "figures": {"gradient_off": worst},
    }


def speed(device: torch.device, quick: bool) -> dict:
    """S-NDCG and InfoNCE by the length of the list, beside the three products of a step."""
    rows, figures = [], {}
    for size in (32,) if quick else (512, 1024, 2048, 4096, 8192, 16384):
        image, text, scores, relevance = batch(size, device, 64 if quick else 1024)
        gradient = torch.randn_like(scores)

        def products(kind: torch.dtype, parts=(image, text, gradient)):
            a, b, c = (part.to(kind) for part in parts)
            return lambda: (a @ b.T, c @ b, c.T @ a)

        ndcg = stepped("smooth_ndcg", scores, relevance, tau=TAU)
        eye = torch.eye(size, device=device) > 0
        nce = stepped("info_nce", scores, eye, temperature=0.05)
        extra = megabytes(ndcg, device)
        whole = size * size * 4 / 2**20
        took = milliseconds(ndcg, device)
        figures |= {f"ndcg_ms_{size}": took, f"ndcg_scores_{size}": extra and extra / whole}
        row = [size, milliseconds(products(torch.float32), device)]
        row += [milliseconds(products(torch.bfloat16), device), took, extra]
        row += [extra and extra / whole, milliseconds(nce, device), megabytes(nce, device)]
        rows.append(row)
    columns = ["B", "products fp32, ms", "bf16, ms", "S-NDCG, ms", "MB", "x scores"]
    return {
        "title": f"forward and backward, both ways, tau {TAU}",
        "columns": [*columns, "InfoNCE, ms", "MB"],
        "rows": rows,
        "figures": figures,
    }


def others(device: torch.device, quick: bool) -> dict:
    """The other losses of a large batch, and S-NDCG streamed, whose scores are never whole."""
    size, rows = 32 if quick else 4096, []
    _, _, scores, relevance = batch(size, device, 64)
    eye = torch.eye(size, device=device) > 0
    for name, settings in OTHERS:
        work = stepped(name, scores, relevance if name in GRADED else eye, **settings)
        about = f"{name} {settings or ''}".strip()
        rows.append([about, size, milliseconds(work, device, 5), megabytes(work, device)])
    del scores, relevance, eye
    figures = {}
    for length, width in ((64, 16),) if quick else ((32_768, 512), (65_536, 256)):
        work = streamed(length, width, device)
        work()
        took = milliseconds(work, device, 3, 1.0)
        rows.append([f"smooth_ndcg streamed, D {width}", length, took, megabytes(work, device)])
        figures[f"streamed_ms_{length}"] = took
    return {
        "title": "other losses, both ways",
        "columns": ["loss", "B", "ms", "MB"],
        "rows": rows,
        "figures": figures,
    }


def streamed(size: int, width: int, device: torch.device):
    """S-NDCG of embeddings, its relevance from caption vectors block by block."""
    generator = torch.Generator(device=device).manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device)
        return torch.nn.functional.normalize(drawn, dim=1)

    image, caption_BE = unit(size, width), unit(size, 384)
    text = torch.nn.functional.normalize(image + 0.06 * width**0.5 * unit(size, width), dim=1)

    def relevance(rows: slice, columns: slice) -> torch.Tensor:
        return (caption_BE[rows] @ caption_BE[columns].T).clamp_(0, 1)

    def work() -> None:
        a, b = image.detach().requires_grad_(), text.detach().requires_grad_()
        both_directions_streamed("smooth_ndcg", a, b, relevance, tau=TAU).backward()
        wait(device)

    return work


def neighbours(device: torch.device, quick: bool) -> dict:
    """The exact engine of the label lists on the device, and whether its lists are the CPU's."""
    from pipeline.retrieval.nearest import top_k

    rows = []
    for count in (300,) if quick else (16_384, 131_072):
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(count, 384, generator=generator)
        v[count // 2 : count // 2 + count // 8] = v[: count // 8].clone()  # captions come twice
        v = torch.nn.functional.normalize(v, dim=1)
        there = v.to(device)
        took = milliseconds(lambda v=there: top_k(v, None, 64), device, 3, 3.0)
        few = slice(0, 512)  # of a large collection the CPU's take minutes
        on_cpu, found = top_k(v[few], v, 64), top_k(there[few], there, 64)
        same = all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, found, strict=True))
        rows.append([count, 64, took, count**2 / took / 1e6, same])
    return {
        "title": "exact neighbours, D 384",
        "columns": ["vectors", "K", "ms", "G pairs/s", "the CPU's, byte for byte"],
        "rows": rows,
        "figures": {},
    }
