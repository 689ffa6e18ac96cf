"""Speed and memory of re-ranking, as ratios within one run on one core.

    python -m bench.rerank              # all sections; about three minutes
    python -m bench.rerank graph        # some sections of: graph step memory

`graph`: affinity graphs of 1,000 image queries (33 nodes) and 5,000 caption queries (9 nodes)
against one `np.intersect1d` a pair of nodes and side, as the public loader has it, which builds the
image's graph once for each of its five captions. The loop is timed on a sample of its queries.
`step`: a training step, lists made anew, against the same model fed by the public data path
restated, a data set whose samples make their graphs by that loop.
`memory`: inverted softmax and LeaPRR on a gallery of COCO 5K's size (5,000 images, 25,000 captions,
all queries of both directions, random towers), in a process of its own.
CPU seconds.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.reranking import fitting
from pipeline.reranking.leaprr import losses
from pipeline.reranking.leaprr.graph import affinity
from pipeline.reranking.leaprr.model import CandidateLists, LeaPRR, candidate_lists
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


class PublicPairs(Dataset):
    """The public data path, plainly: a sample's two graphs are made whenever it is asked for."""

    def __init__(self, problem: Problem, settings: LeaPRRSettings):
        self.settings, self.scores, self.near = settings, {}, {}
        depth = max(settings.pillars, settings.candidates_i2t, settings.candidates_t2i)
        for pair in itertools.product(("image", "text"), repeat=2):
            rows = [problem.gallery[side] for side in pair]
            scores = problem.sims.between(pair[0], rows[0], pair[1], rows[1])
            self.scores[pair] = scores.numpy()
            self.near[pair] = scores.topk(depth, dim=1).indices.numpy()

    def __len__(self) -> int:
        return len(self.scores["text", "text"])

    def __getitem__(self, caption: int) -> dict:
        rows = {"i2t": caption // 5, "t2i": caption}
        return {d: self._list(rows[d], *SIDES[d], k) for d, k in self._candidates().items()}

    def _candidates(self) -> dict:
        return {"i2t": self.settings.candidates_i2t, "t2i": self.settings.candidates_t2i}

    def _list(self, row: int, asking: str, ranked: str, k: int) -> tuple:
        some, s = self.near[asking, ranked][row][:k], self.settings
        graph = {
            side: np.stack([self.near[asking, side][row][:C], *self.near[ranked, side][some, :C]])
            for side in (asking, ranked)
        }
        features = []
        for side in (ranked, asking):
            pillars = self.near[asking, side][row][: s.pillars]
            nodes = self.scores[ranked, side][some][:, pillars]
            features.append(np.stack([self.scores[asking, side][row][pillars], *nodes]))
        claims = self.scores[ranked, asking][some[:, None], self.near[ranked, asking][some]]
        own = self.scores[asking, ranked][row][self.near[asking, ranked][row]]
        claims = np.stack([own, *claims])[:, : s.pillars]
        affinities = loop(graph["image"], graph["text"], s.threshold / (1 + k))
        score = self.scores[asking, ranked][row][some]
        return row, some, score, features, claims, affinities.astype(np.float32)


def step() -> None:
    problem, settings = collection(1000, 1000), LeaPRRSettings()
    torch.manual_seed(0)
    model = LeaPRR(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    views = {direction: next(problem.views(direction)) for direction in SIDES}
    for view in views.values():  # what is made once for a gallery
        candidate_lists(view, view.queries_Q[:1], settings)
    rows = {"i2t": torch.arange(settings.batch_size), "t2i": 5 * torch.arange(settings.batch_size)}
    loader = DataLoader(PublicPairs(problem, settings), batch_size=settings.batch_size)

    def trained(made: dict[str, CandidateLists]) -> None:
        optimizer.zero_grad()
        loss = 0
        for refined, some in zip(model(list(made.items())), made.values(), strict=True):
            positive_BK = torch.zeros_like(some.score_BK, dtype=torch.bool)
            positive_BK[:, 0] = True
            loss = loss + losses.refinement(refined, some.score_BK, positive_BK, settings).mean()
        loss.backward()
        optimizer.step()

    def ours() -> None:
        trained({d: candidate_lists(view, rows[d], settings) for d, view in views.items()})

    def public() -> None:
        trained(
            {direction: CandidateLists(*some) for direction, some in next(iter(loader)).items()}
        )

    ours()
    mine, restated = min(cpu(ours) for _ in range(3)), cpu(public)
    print(f"training step of {settings.batch_size} pairs, lists and graphs anew: {mine:.2f} s CPU")
    print(f"  by the public data path restated: {restated:.1f} s, {restated / mine:.0f}x")


def memory() -> None:
    problem, model = collection(5000, 1000), LeaPRR(LeaPRRSettings()).eval()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 2**20
    setting = {"beta": 20.0}
    steps = [{"method": "inverted_softmax", "i2t": setting, "t2i": setting}, {"method": "leaprr"}]
    reranker = fitting.Reranker(problem, steps, model)
    out = {}
    for direction, (asking, _) in SIDES.items():
        rows = problem.gallery[asking]
        first = cpu(lambda d=direction, r=rows: reranker.scores(d, r[:1]))
        parts = rows.split(256)
        rest = cpu(lambda d=direction, p=parts: sum(len(reranker.scores(d, part)) for part in p))
        out[direction] = [first, rest, 1e3 * rest / len(rows)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": peak, "more": peak - before, **out}))


def apart(section: str) -> None:
    command = [sys.executable, "-m", "bench.rerank", section, "here"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"5,000 images, 25,000 captions, bank of 1,000 images: at most {found['more']:,.0f} MB "
        f"beyond the inputs (peak {found['peak']:,.0f} MB)"
    )
    for way in SIDES:
        first, rest, each = found[way]
        print(f"  {way}: {first:.1f} s once, all queries {rest:.1f} s CPU, {each:.2f} ms each")


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:] or ["graph", "step", "memory"]
    if asked == ["memory", "here"]:
        with torch.inference_mode():
            memory()
    else:
        for name in asked:
            {"graph": graph, "step": step, "memory": lambda: apart("memory")}[name]()
