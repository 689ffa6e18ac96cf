"""Speed and memory of exact evaluation, 5,000 × 25,000: python -m bench.evaluate

The places of all positives in both directions, from vectors and from the matrix, against the bare
float32 product and against the per-row argsort loop of the field's public code; NDCG@all against
scikit-learn. CPU time on one thread, ratios within this run.
"""

import os
import time

import numpy as np
import torch
from sklearn.metrics import ndcg_score

from bench import peak_memory
from pipeline.formulas.metrics import ndcg
from pipeline.retrieval import ranks
from pipeline.retrieval.ranks import Pairs

IMAGES, TEXTS, WIDTH = 5000, 25000, 1024
ROUNDS = 3
SAMPLE = 200  # rows that the slow ones are timed on
OWN = np.arange(TEXTS) // (TEXTS // IMAGES)
PAIRS = Pairs(OWN, np.arange(TEXTS)), Pairs(np.arange(TEXTS), OWN)


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images (5000, 1024) and of texts (25000, 1024) that know their images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, WIDTH, generator=generator)
    texts = torch.randn(TEXTS, WIDTH, generator=generator).mul_(7).add_(images[OWN])
    return tuple(v.div_(v.norm(dim=1, keepdim=True)) for v in (images, texts))


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def products(images, texts) -> None:
    """The whole product, block by block."""
    block = ranks.BLOCK
    buffer = torch.empty(block * block)
    for i in range(0, IMAGES, block):
        for j in range(0, TEXTS, block):
            a, b = images[i : i + block], texts[j : j + block]
            torch.mm(a, b.T, out=buffer[: len(a) * len(b)].view(len(a), len(b)))


def argsort_loop(scores, rows_i, rows_t) -> None:
    """Recalls as the public code takes them: a sort of every row, then a look for each positive."""
    for i in rows_i:
        order = np.argsort(scores[i])[::-1]
        min(np.where(order == text)[0][0] for text in range(5 * i, 5 * i + 5))
    for t in rows_t:
        order = np.argsort(scores[:, t])[::-1]
        np.where(order == OWN[t])[0][0]


def from_vectors(images, texts) -> None:
    best = {"product": np.inf, "places": np.inf}
    for _ in range(ROUNDS):
        best["product"] = min(best["product"], seconds(lambda: products(images, texts)))
        taken = seconds(lambda: ranks.of_vectors(images, texts, *PAIRS))
        best["places"] = min(best["places"], taken)
    rate = 2 * IMAGES * TEXTS * WIDTH / best["product"] / 1e9
    share = best["product"] / best["places"]
    print(
        f"product {best['product']:.2f} s ({rate:.0f} GFLOP/s), places {best['places']:.2f} s: ",
        end="",
    )
    print(f"{share:.0%} of the product's rate")


def from_matrix(scores: torch.Tensor) -> None:
    ours = min(seconds(lambda: ranks.of_matrix(scores, *PAIRS)) for _ in range(ROUNDS))
    matrix, step = scores.numpy(), IMAGES // SAMPLE
    of_i = seconds(lambda: argsort_loop(matrix, range(0, IMAGES, step), ())) * step
    of_t = seconds(lambda: argsort_loop(matrix, (), range(0, TEXTS, 5 * step))) * 5 * step
    print(f"from the matrix: ours {ours:.2f} s, argsort loop {of_i + of_t:.1f} s, ", end="")
    print(f"{(of_i + of_t) / ours:.0f} times as long (its i2t {of_i:.1f} s)")


def graded(scores: torch.Tensor) -> None:
    scores = scores[:SAMPLE].contiguous()
    relevance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1))
    gains, numbers = torch.exp2(relevance.double()).sub_(1).numpy(), scores.numpy()
    ours = min(seconds(lambda: ndcg(scores, relevance)) for _ in range(ROUNDS))
    theirs = min(seconds(lambda: ndcg_score(gains, numbers)) for _ in range(ROUNDS))
    exact = min(
        seconds(lambda: ndcg_score(gains, numbers, ignore_ties=True)) for _ in range(ROUNDS)
    )
    print(f"NDCG@all of {SAMPLE} queries: ours {ours:.2f} s, scikit-learn {theirs:.2f} s: ", end="")
    print(f"{theirs / ours:.1f} times as long ({exact / ours:.1f} where it ignores ties)")


def above_the_vectors(images, texts) -> None:
    """Peak above the vectors, measured in a process of its own."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    start = peak_memory.from_here()
    ranks.of_vectors(images, texts, *PAIRS)
    print(f"memory above the vectors: {peak_memory.peak() - start:.0f} MB", flush=True)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    images, texts = vectors()
    ranks.of_vectors(images[:50], texts[:250], *(Pairs(p[0][:50], p[1][:50] % 50) for p in PAIRS))
    above_the_vectors(images, texts)
    from_vectors(images, texts)
    scores = images @ texts.T
    from_matrix(scores)
    graded(scores)


if __name__ == "__main__":
    main()
