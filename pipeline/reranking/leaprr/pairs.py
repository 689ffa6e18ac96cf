"""What LeaPRR is trained on: pairs of an image and a caption, in galleries of the training data.

Lists are made as they will be made when queries are re-ranked: the images of the training data are
cut into galleries, and what is not in a gallery is the bank. Order and draws are a function of the
seed and the epoch.
"""

from dataclasses import dataclass, replace

import torch

from pipeline.reranking import fitting
from pipeline.reranking.problem import SIDES, Problem, View

FEWEST = 32  # images of a last gallery that is still worth having


def galleries(problem: Problem, images: int, seed: int) -> list[Problem]:
    """The problem's images dealt into galleries of so many, each with the others as its bank.

    Where the problem has a bank of its own, that stays the bank of all.
    """
    own = problem.gallery["image"]
    generator = torch.Generator().manual_seed(seed)
    order = own[torch.randperm(len(own), generator=generator)]
    parts = [part for part in order.split(images) if len(part) >= min(FEWEST, len(own))]
    fewest = 1 if problem.pool == "transductive" or len(problem.bank["image"]) else 2
    if len(parts) < fewest:  # of two, one is the gallery and the other the bank
        parts = list(order.chunk(fewest))
    found = []
    for part in parts:
        inside = torch.isin(problem.owner["text"], part)
        gallery = {"image": part, "text": inside.nonzero()[:, 0]}
        bank = problem.bank
        if not len(bank["image"]):
            bank = {
                side: rows[~torch.isin(problem.owner[side][rows], part)]
                for side, rows in problem.gallery.items()
            }
        found.append(replace(problem, gallery=gallery, bank=bank))
    return found


class TrainingPairs:
    """Image queries and caption queries of one image, with the views they are asked in."""

    def __init__(self, problems: list[Problem], steps: list[dict]):  # of the chain before LeaPRR
        self.problems = problems
        self.views = [{d: fitting.views(p, d, steps) for d in SIDES} for p in problems]

    def epoch(self, seed: int, batch_size: int) -> list["PairBatch"]:
        """The batches of an epoch in order: every image once, with one of its captions."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for number, problem in enumerate(self.problems):
            asked = self.views[number]["t2i"]
            view = int(torch.randint(len(asked), (1,), generator=generator))
            texts = asked[view].queries_Q  # of one pool, where captions of an image have several
            drawn = texts[torch.randperm(len(texts), generator=generator)]
            owner = problem.owner["text"][drawn]
            caption = torch.full((problem.sims.sizes["image"],), -1).scatter_(0, owner, drawn)
            images = problem.gallery["image"]
            images = images[caption[images] >= 0]
            images = images[torch.randperm(len(images), generator=generator)]
            views = {"i2t": self.views[number]["i2t"][0], "t2i": asked[view]}
            batches += [PairBatch(views, part, caption[part]) for part in images.split(batch_size)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in order]


@dataclass(frozen=True)
class PairBatch:
    """B images and a caption of each, with the views they are asked in."""

    views: dict[str, View]
    images_B: torch.Tensor
    captions_B: torch.Tensor
