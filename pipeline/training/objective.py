"""The training objective: a weighted sum of losses over the list of the whole global batch."""

import functools
import math
from typing import Any

import torch

from pipeline.errors import InputError, did_you_mean
from pipeline.formulas.losses import LOSSES, WeightedSum
from pipeline.labels.caption_vectors import StoredCaptions, put_decided, relevance_of
from pipeline.training.data import Batch, Split
from pipeline.training.distributed import ProcessGroup
from schemas.settings import LabelSettings, TrainSettings


def check(settings: TrainSettings) -> None:
    """Refuses losses that do not exist, and settings that they do not have or cannot work with."""
    if not settings.losses:
        raise InputError(f"train.losses is empty; choose from {', '.join(LOSSES)}")
    for name, given in settings.losses.items():
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r} in train.losses{did_you_mean(name, LOSSES)}")
        if given.get("average") == "pairs":  # each worker has queries of its own only
            raise InputError(
                f"train.losses.{name}.average is 'pairs', which needs all queries in one process; "
                "use 'queries'"
            )
        try:  # on a list of two, at both ends of every schedule: before any work
            loss, two = WeightedSum({name: given}), torch.eye(2)
            for time in (-math.inf, math.inf):
                value = float(loss(two, two > 0, two, time=time).sum())
                if not math.isfinite(value):
                    raise ValueError(f"{given} gives {value} on a list of two; change its settings")
        except (TypeError, ValueError) as error:
            raise InputError(f"train.losses.{name}: {error}") from error


def loss_of(settings: TrainSettings) -> WeightedSum:
    """The weighted sum, times in epochs; a triplet starts on all negatives.

    On the hardest ones from the first step it collapses, so that its mining waits, unless the
    recipe says how it goes.
    """
    losses = dict(settings.losses)
    if "triplet" in losses:
        wait = {"from": 0, "to": 1, "over": settings.negatives_warmup, "shape": "jump"}
        losses["triplet"] = {"mining": wait, **losses["triplet"]}
    return WeightedSum(losses)


def needs_relevance(settings: TrainSettings) -> bool:
    return any(LOSSES[name].graded for name in settings.losses)


class Objective:
    """Loss of one worker's pairs against the global batch, both directions."""

    def __init__(
        self,
        settings: TrainSettings,
        label: LabelSettings,
        split: Split | None,
        captions: StoredCaptions | None,
        world: ProcessGroup,
    ):
        self.loss, self.label, self.world = loss_of(settings), label, world
        self.captions = captions

    def __call__(
        self, images_nD: torch.Tensor, texts_nD: torch.Tensor, batch: Batch, epoch: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss to minimise and its terms; every worker's share of the global list's loss."""
        images_BD, texts_BD = self.world.gather(images_nD), self.world.gather(texts_nD)
        rows_B = self.world.gather(batch.image_rows)
        same_nB = batch.image_rows[:, None] == rows_B[None, :]
        relevance = (None, None) if self.captions is None else self._relevance(batch, same_nB)
        how: dict[str, Any] = {
            "time": epoch,
            "scored": True,
        }  # products of unit vectors are never -inf
        i2t = self.loss.terms(images_nD @ texts_BD.T, same_nB, relevance[0], **how)
        t2i = self.loss.terms(texts_nD @ images_BD.T, same_nB, relevance[1], **how)
        terms = {name: (i2t[name].mean() + t2i[name].mean()) / 2 for name in i2t}
        return functools.reduce(torch.add, terms.values()), terms

    def _relevance(self, batch: Batch, same_nB) -> tuple[torch.Tensor, torch.Tensor]:
        """Relevance (n, B) of own images to all texts, and of own texts to all images."""
        device = same_nB.device
        images_nCE, mask_nC, texts_nE = self.captions.of_pairs(batch.caption_rows)
        texts_BE = self.world.gather(texts_nE.to(device))
        masks = {"mask_MC": mask_nC.to(device), "same_image_MN": same_nB}
        i2t_nB = relevance_of(images_nCE.to(device), texts_BE, self.label, **masks)
        if self.label.overrides is not None:
            caption_rows_B = self.world.gather(batch.caption_rows)
            rows = (batch.image_rows.cpu().numpy(), caption_rows_B.cpu().numpy())
            i2t_nB = put_decided(i2t_nB, *rows, self.captions.decided(self.label))
        # r is not symmetric: own texts' column of the whole matrix, whose rows are all images.
        n = len(images_nCE)
        own = slice(self.world.rank * n, (self.world.rank + 1) * n)
        return i2t_nB, self.world.gather(i2t_nB)[:, own].T


def needs_embeddings(settings: TrainSettings) -> bool:
    """Whether captions' vectors are used: by a graded loss or choice, or to find neighbours."""
    return needs_labels(settings) or settings.neighbours > 1


def needs_labels(settings: TrainSettings) -> bool:
    """Whether relevance is used: by a graded loss, or to choose the best checkpoint."""
    return needs_relevance(settings) or settings.select == "best_ndcg"
