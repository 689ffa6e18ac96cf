"""LeaPRR as the training loop sees it: both sub-models, on pairs of an image and a caption.

Every worker takes its share of each batch.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.errors import InputError
from pipeline.reranking import fitting
from pipeline.reranking.leaprr import losses
from pipeline.reranking.leaprr.model import CandidateLists, LeaPRR, candidate_lists
from pipeline.reranking.leaprr.pairs import PairBatch, TrainingPairs, galleries
from pipeline.reranking.problem import SIDES, Problem, View
from pipeline.retrieval.scores import other
from pipeline.storage.plan import Piece
from pipeline.training.checkpoint import Tensors, put_state, state_of
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loop import Course
from schemas.checkpoint import Checkpoint


class LeaPRRTrainer:
    """A `Trainer` of LeaPRR, on pairs; `val` is what its epochs are compared on."""

    vocabulary_state: list | dict | None = None

    def __init__(self, piece: Piece, world: ProcessGroup, train: Problem, val: Problem | None):
        self.world, self.settings = world, piece.inputs["leaprr"]
        before, s = piece.inputs["steps"], self.settings
        self.data = TrainingPairs(galleries(train, s.gallery, s.seed), before)
        self.val, self.chain = val, [*before, {"method": "leaprr"}]
        torch.manual_seed(s.seed)
        self.model = LeaPRR(s).to(self.world.device)
        self.parallel = self.world.share(self.model)
        self.optimizer = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=s.lr, weight_decay=s.weight_decay),
            "sgd": lambda p: torch.optim.SGD(p, s.lr, 0.9, weight_decay=s.weight_decay),
        }[s.optimizer](self.model.parameters())
        self.course = Course(s.epochs)
        self.steps = max(1, len(self.data.epoch(0, s.batch_size)))
        self.epoch, self.total = 0, 0.0  # that is trained, and the sum of its losses
        self.about: dict[str, Any] = {
            "settings": s.model_dump(mode="json"),
            "data_version": piece.inputs["version"],
            "label_version": None,
        }

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """All of the epoch: no checkpoint is written inside one, so `start` is its first step."""
        s, self.epoch, self.total = self.settings, epoch, 0.0
        self.model.train()
        return iter(self.data.epoch(s.seed * 100_003 + epoch, s.batch_size))

    def loading(self) -> tuple[float, float]:
        return 0.0, 0.0  # all is in memory

    def close(self) -> None:
        return  # nobody makes them

    def pairs(self, batch: PairBatch) -> int:
        return len(batch.images_B)

    def step(self, batch: PairBatch, number: int) -> Callable[[], dict[str, float]]:
        s, schedule = self.settings, torch.pi * number / (self.steps * self.settings.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * (1 + torch.cos(torch.tensor(schedule)).item()) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        self.total += float(loss.detach())
        return lambda: {"train/loss": float(self.world.mean(torch.tensor(self.total / self.steps)))}

    def of_epoch(self, record: dict[str, float]) -> dict[str, float]:
        """The mean loss of the epoch's steps."""
        if not math.isfinite(record["train/loss"]):
            raise InputError(
                f"LeaPRR's loss is not finite after epoch {self.epoch + 1}; lower --leaprr.lr"
            )
        return record

    def _loss(self, batch: PairBatch) -> torch.Tensor:
        """Mean over the batch's pairs of both directions' losses: this worker's part of it."""
        share, s = slice(self.world.rank, None, self.world.size), self.settings
        rows = {"i2t": batch.images_B[share], "t2i": batch.captions_B[share]}
        if not len(rows["i2t"]):  # a last batch of fewer pairs than workers
            return torch.stack([p.sum() for p in self.parallel.parameters()]).sum() * 0
        asked = {d: self._asked(batch.views[d], rows[d]) for d in SIDES}
        lists_ = [(d, some) for d, (some, _) in asked.items()]
        if s.alignment:
            lists_ += [self._aligned(batch.views, asked, d) for d in SIDES]
        refined = self.parallel(lists_)
        total = refined[0].new_zeros(())
        for (some, positive_BK), refined_BK in zip(asked.values(), refined, strict=False):
            total = total + losses.refinement(refined_BK, some.score_BK, positive_BK, s).sum()
        for two in zip(refined, refined[2:], strict=False):
            total = total + s.alignment * losses.alignment(*two, s.temperature).sum()
        # DDP takes the mean over workers, whose shares may differ by a pair.
        return total * self.world.size / len(batch.images_B)

    @torch.no_grad()
    def _asked(self, view: View, rows_B) -> tuple[CandidateLists, torch.Tensor]:
        some = candidate_lists(view, rows_B, self.settings)
        return some, view.positives(rows_B).gather(1, some.place_BK)

    @torch.no_grad()
    def _aligned(self, views: dict[str, View], asked: dict, direction: str):
        """The other direction, and its queries' lists of the partners of this one's candidates.

        An image's candidate texts stand for their images, of which its caption is asked; a
        caption's candidate images for a caption each, of which its image is asked.
        """
        back = other(direction)
        here, there, owner = views[direction], views[back], views[direction].problem.owner
        owner_N = owner[here.ranked][here.gallery_N]
        partners, place = owner[there.ranked][there.gallery_N].sort(stable=True)
        first_N = place[torch.searchsorted(partners, owner_N).clamp(max=len(place) - 1)]
        place_BK = first_N[asked[direction][0].place_BK]
        rows_B = asked[back][0].rows_B
        return back, candidate_lists(there, rows_B, self.settings, place_BK=place_BK)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        if self.val is None:
            return {}
        self.model.eval()
        sums = fitting.sums(self.val, self.chain, self.model)
        return {"val/i2t": sums[0], "val/t2i": sums[1], "val/rsum": sum(sums)}

    def frozen(self) -> dict[str, torch.Tensor]:
        return {}

    def state(self) -> tuple[Tensors, dict]:
        return state_of(self.model, self.optimizer)

    def restore(self, checkpoint: Checkpoint, files: Tensors) -> None:
        if self.world.together:  # DDP orders its buckets after a first backward pass: do it now
            self._loss(next(self.batches(0))).backward()
            self.optimizer.zero_grad(set_to_none=True)
        put_state(self.model, self.optimizer, files, checkpoint.optimizer)

    def same_batches(self, checkpoint: Checkpoint) -> bool:
        return False  # another fingerprint's: it never goes on from one

    def summary(self, chosen: Checkpoint, records: list[dict], torn: list[str]) -> dict:
        return {
            "epoch": chosen.epoch,
            "metrics": {k: v for k, v in chosen.metrics.items() if k == "val/rsum"},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "leaprr": self.about["settings"],
            "steps": self.chain,
        }
