"""The engine of nearest neighbours against faiss and this machine's matrix product, in one run.

    python -m bench.relevance CAPTIONS VECTORS.npy            # speed, recall, memory on captions
    python -m bench.relevance random N [N …]                  # time and memory on random vectors

CAPTIONS is a .jsonl or .jsonl.gz file of lines {"captions": [...]}; their vectors, those of
all-MiniLM-L6-v2, are kept in VECTORS.npy. On one thread, CPU seconds, the best of two rounds in
which every way takes its turn. Memory is the peak of a process of its own above its vectors and the
output.

Legend of the shape suffixes: N vectors, D width.
"""

import os
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from bench import peak_memory
from bench.encode import captions_of
from pipeline.labels import embed
from pipeline.retrieval.nearest import BLOCK, top_k
from schemas.settings import EmbedSettings

K, ROUNDS, SAMPLE, WIDTH = 100, 2, 500, 384
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)


def vectors_of(captions: Path, kept: Path) -> torch.Tensor:
    """Unit vectors (N, D) float32 of the captions, encoded once."""
    if not kept.exists():
        texts = captions_of(captions, None)
        np.save(kept, embed.encode(texts, EmbedSettings()).astype(np.float16))
    return torch.nn.functional.normalize(torch.from_numpy(np.load(kept)).float(), dim=1)


def random_vectors(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    v_ND = torch.randn(count, WIDTH, generator=generator)
    return v_ND.div_(v_ND.norm(dim=1, keepdim=True))


def seconds(work) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def products(v_ND) -> None:
    """Forty blocks of the product in fp32."""
    out = torch.empty(BLOCK, BLOCK)
    for _ in range(40):
        torch.mm(v_ND[:BLOCK], v_ND[BLOCK : 2 * BLOCK].T, out=out)


def speed(v_ND: torch.Tensor) -> None:
    index = faiss.IndexFlatIP(v_ND.shape[1])
    index.add(v_ND.numpy())
    ways = {
        "fp32 blocks": lambda: products(v_ND),
        "faiss IndexFlatIP": lambda: index.search(v_ND.numpy(), K),
        "ours": lambda: top_k(v_ND, None, K),
        "ours, bf16": lambda: top_k(v_ND, None, K, scan="bf16", fast=True),
        "ours, fp32": lambda: top_k(v_ND, None, K, scan="fp32", fast=True),
        "ours, torch alone": lambda: top_k(v_ND, None, K, fast=False),
        "ours, one side at a time": lambda: top_k(v_ND, v_ND, K),
        "ours, bf16, one side": lambda: top_k(v_ND, v_ND, K, scan="bf16", fast=True),
        "ours, fp32, one side": lambda: top_k(v_ND, v_ND, K, scan="fp32", fast=True),
    }
    for scan in ("int8", "bf16", "fp32"):
        top_k(v_ND[:300], None, K, scan=scan, fast=True)  # compiles
    best, found = {}, {}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            taken, found[name] = seconds(work)
            best[name] = min(taken, best.get(name, taken))
    n, width = v_ND.shape
    rate = 2 * 40 * BLOCK**2 * width / best["fp32 blocks"] / 1e9
    print(f"N = {n:,}, K = {K}; fp32 product {rate:.0f} GFLOP/s\n")
    print("| way | CPU s | x faiss | share of the fp32 product's rate | recall |")
    for name in [name for name in ways if name != "fp32 blocks"]:
        share = 2 * n * n * width / best[name] / 1e9 / rate
        times = best["faiss IndexFlatIP"] / best[name]
        kept = recall(v_ND, found[name][1])
        print(f"| {name} | {best[name]:.2f} | {times:.2f} | {share:.0%} | {kept:.5f} |")


def recall(v_ND, rows_NK) -> float:
    """Share of the neighbours that score no less than the true Kth, on a sample, by float64."""
    sample = torch.linspace(0, len(v_ND) - 1, SAMPLE).long()
    exact = (v_ND[sample].double() @ v_ND.double().T).float()
    least = torch.topk(exact, K, dim=1).values[:, -1:]
    rows = torch.as_tensor(rows_NK)[sample].long()
    return float((exact.gather(1, rows) >= least).float().mean())


def beyond(make, name: str) -> None:
    """Peak above vectors and output, measured in a process of its own."""
    child = os.fork()
    if child == 0:
        v_ND = make()
        top_k(v_ND[:300], None, K, scan="int8", fast=True)  # compiles
        start = peak_memory.from_here()
        taken, found = seconds(lambda: top_k(v_ND, None, K))
        output = sum(part.numel() * part.element_size() for part in found) / 2**20
        extra, block = peak_memory.peak() - start - output, 4 * BLOCK**2 / 2**20
        codes = len(v_ND) * v_ND.shape[1] / 2**20
        print(
            f"{name}, N = {len(v_ND):,}: {taken:.1f} CPU s; vectors {4 * codes:.0f} MB, output "
            f"{output:.0f} MB, beyond them {extra:.0f} MB = {extra / block:.1f} blocks of "
            f"{block:.0f} MB, int8 codes of {codes:.0f} MB among them",
            flush=True,
        )
        os._exit(0)
    _, state = os.waitpid(child, 0)
    if state:
        raise SystemExit(f"the process that measures {name} failed")


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    if sys.argv[1] == "random":
        for count in map(int, sys.argv[2:]):
            beyond(lambda count=count: random_vectors(count), "random vectors")
        return
    v_ND = vectors_of(Path(sys.argv[1]), Path(sys.argv[2]))
    speed(v_ND)
    beyond(lambda: v_ND, "captions")


if __name__ == "__main__":
    main()
