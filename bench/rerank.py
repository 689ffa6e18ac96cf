"""Speed and memory of re-ranking, as ratios within one run on one core.

    python -m bench.rerank              # all sections; about four minutes
    python -m bench.rerank graph        # some sections of: graph step memory

`graph`: affinity graphs of 1,000 image queries (33 nodes) and 5,000 caption queries (9 nodes)
against one `np.intersect1d` a pair of nodes and side, as the public loader has it, which builds the
image's graph once for each of its five captions. The loop is timed on a sample of its queries.
`step`: a training step, lists made anew, against the same model whose graphs come from that loop.
`memory`: a COCO-5K-sized inference (5,000 images, 25,000 captions) in a process of its own.
CPU seconds.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from pipeline.reranking import fitting, losses
from pipeline.reranking.graph import affinity
from pipeline.reranking.leaprr import LeaPRR, lists
from pipeline.reranking.problem import SIDES, Problem
from pipeline.reranking.similarities import Towers
from schemas.settings import LeaPRRSettings

C = 10  # neighbours in a list
SAMPLE = 20  # queries the loop is timed on


def cpu(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def drawn(*shape) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
    return torch.nn.functional.normalize(vectors, dim=1)


def collection(images: int, bank: int, dim=256) -> Problem:
    """Random vectors, five captions an image."""
    sizes = {"image": images, "text": 5 * images}
    totals = {"image": images + bank, "text": 5 * (images + bank)}
    return Problem(
        Towers(drawn(totals["image"], dim), drawn(totals["text"], dim)),
        gallery={side: torch.arange(size) for side, size in sizes.items()},
        bank={side: torch.arange(size, totals[side]) for side, size in sizes.items()},
        owner={
            "image": torch.arange(totals["image"]),
            "text": torch.arange(totals["text"]) // 5,
        },
    )


def loop(images_VC: np.ndarray, texts_VC: np.ndarray, threshold: float) -> np.ndarray:
    """One query's affinity, a pair at a time."""
    nodes = range(len(images_VC))
    counts = np.array(
        [
            [sum(len(np.intersect1d(side[i], side[j])) for side in (images_VC, texts_VC))
             for j in nodes]
            for i in nodes
        ]
    )  # fmt: skip
    rows = counts / counts.sum(1, keepdims=True)
    rows = rows * (rows > threshold)
    return rows / rows.sum(1, keepdims=True)


def neighbour_lists(queries: int, nodes: int, among: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(nodes)
    draws = torch.randint(among, (queries * nodes, C), generator=generator)
    distinct = (draws.sort(1).values + torch.arange(C) * among) % (among * C)
    return distinct.view(queries, nodes, C)


def graph() -> None:
    sets = {}
    for name, queries, nodes in (("i2t", 1000, 33), ("t2i", 5000, 9)):
        sets[name] = [neighbour_lists(queries, nodes, among) for among in (100, 500)]
    ours = min(
        cpu(
            lambda: [affinity(*sides, threshold=0.8 / sides[0].shape[1]) for sides in sets.values()]
        )
        for _ in range(3)
    )
    one = {}
    for name, sides in sets.items():
        arrays = [side[:SAMPLE].numpy() for side in sides]
        limit = 0.8 / arrays[0].shape[1]
        found = []
        pairs = list(zip(*arrays, strict=True))
        one[name] = cpu(lambda p=pairs, t=limit, f=found: f.extend(loop(*a, t) for a in p))
        same = affinity(*(side[:SAMPLE] for side in sides), threshold=limit)
        assert np.allclose(np.stack(found), same, atol=1e-6)
    public = 5000 * (one["i2t"] + one["t2i"]) / SAMPLE
    cached = (1000 * one["i2t"] + 5000 * one["t2i"]) / SAMPLE
    print(f"graphs of 1,000 images and 5,000 captions: ours {1e3 * ours:.0f} ms CPU")
    print(
        f"  a pair at a time, image graphs once a caption  {public:7.1f} s  {public / ours:,.0f}x"
    )
    print(
        f"  a pair at a time, image graphs once an image   {cached:7.1f} s  {cached / ours:,.0f}x"
    )


def step() -> None:
    problem, settings = collection(1000, 1000), LeaPRRSettings()
    torch.manual_seed(0)
    model = LeaPRR(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    views = {direction: next(problem.views(direction)) for direction in SIDES}
    for direction, view in views.items():  # what is made once for a gallery
        lists(view, view.queries_Q[:1], model.shape(direction))
    rows = {"i2t": torch.arange(settings.batch_size), "t2i": 5 * torch.arange(settings.batch_size)}

    def ours() -> None:
        optimizer.zero_grad()
        loss = 0
        for direction, view in views.items():
            some = lists(view, rows[direction], model.shape(direction))
            positive_BK = torch.zeros_like(some.score_BK, dtype=torch.bool)
            positive_BK[:, 0] = True
            (refined_BK,) = model([(direction, some)])
            args = refined_BK, some.score_BK, positive_BK, settings
            loss = loss + losses.refinement(*args).mean()
        loss.backward()
        optimizer.step()

    ours()
    mine = min(cpu(ours) for _ in range(3))
    sides = [neighbour_lists(SAMPLE, 33, among).numpy() for among in (100, 500)]
    data = cpu(lambda: [loop(*pair, 0.8 / 33) for pair in zip(*sides, strict=True)]) / SAMPLE
    restated = 2 * settings.batch_size * data
    print(f"training step of {settings.batch_size} pairs, lists and graphs anew: {mine:.2f} s CPU")
    print(f"  its graphs a pair at a time: {restated:.1f} s more, {(mine + restated) / mine:.0f}x")


def memory() -> None:
    problem, model = collection(5000, 1000), LeaPRR(LeaPRRSettings()).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    setting = {"beta": 20.0}
    steps = [{"method": "inverted_softmax", "i2t": setting, "t2i": setting}, {"method": "leaprr"}]
    reranker, queries = fitting.Reranker(problem, steps, model), 1024
    out = {}
    for direction, (asking, _) in SIDES.items():
        rows = problem.gallery[asking][:queries]
        first = cpu(lambda d=direction, r=rows: reranker.scores(d, r[:1]))
        parts = rows.split(256)
        rest = cpu(lambda d=direction, p=parts: [reranker.scores(d, part) for part in p])
        out[direction] = [first, 1e3 * rest / queries]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"before": before / 1024, "peak": peak / 1024, **out}))


def apart(section: str) -> None:
    command = [sys.executable, "-m", "bench.rerank", section, "here"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"5,000 images, 25,000 captions, bank of 1,000 images: peak {found['peak']:,.0f} MB "
        f"({found['before']:,.0f} MB before)"
    )
    for direction in SIDES:
        first, each = found[direction]
        print(f"  {direction}: {first:.1f} s once, then {each:.2f} ms CPU a query")


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:] or ["graph", "step", "memory"]
    if asked == ["memory", "here"]:
        with torch.inference_mode():
            memory()
    else:
        for name in asked:
            {"graph": graph, "step": step, "memory": lambda: apart("memory")}[name]()
