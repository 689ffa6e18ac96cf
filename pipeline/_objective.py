"""The training objective: a weighted sum of losses over the list of the whole global batch."""

import inspect

import torch

from pipeline._batches import Batch, Split
from pipeline._errors import InputError, did_you_mean
from pipeline._world import World
from pipeline.formulas.losses import GRADED, LOSSES
from pipeline.label import Captions, graded
from schemas.settings import LabelSettings, TrainSettings


def check(settings: TrainSettings) -> None:
    """Refuses losses that do not exist or carry no weight."""
    for name, terms in settings.losses.items():
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r} in train.losses{did_you_mean(name, LOSSES)}")
        if not isinstance(terms.get("weight", 1.0), int | float):
            raise InputError(f"train.losses.{name}.weight must be a number")
        known = [*list(inspect.signature(LOSSES[name]).parameters)[2:], "weight"]
        if unknown := [key for key in terms if key not in known]:
            raise InputError(
                f"unknown setting train.losses.{name}.{unknown[0]}{did_you_mean(unknown[0], known)}"
            )
        try:  # on a list of two: a value that no list could have is found before any work
            own = {key: value for key, value in terms.items() if key != "weight"}
            target = torch.eye(2) if name in GRADED else torch.eye(2) > 0
            LOSSES[name](torch.eye(2), target, **own)
        except (TypeError, ValueError) as error:
            raise InputError(f"train.losses.{name}: {error}") from error
    if not settings.losses:
        raise InputError(f"train.losses is empty; choose from {', '.join(LOSSES)}")


def needs_relevance(settings: TrainSettings) -> bool:
    return any(name in GRADED for name in settings.losses)


class Objective:
    """Loss of one worker's pairs against the global batch, both directions."""

    def __init__(
        self,
        settings: TrainSettings,
        label: LabelSettings,
        split: Split,
        captions: Captions | None,
        world: World,
    ):
        self.settings, self.label, self.split, self.world = settings, label, split, world
        self.captions = captions
        if captions is not None and captions.caption_ids != _caption_ids(split):
            raise InputError(
                "embeddings and shards name other captions; run `halftone embed` again"
            )

    def __call__(
        self, images_nD: torch.Tensor, texts_nD: torch.Tensor, batch: Batch, epoch: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss to minimise and its terms; every worker's share of the global list's loss."""
        images_BD, texts_BD = self.world.gather(images_nD), self.world.gather(texts_nD)
        rows_B = self.world.gather(batch.image_rows)
        same_nB = batch.image_rows[:, None] == rows_B[None, :]
        i2t, t2i = images_nD @ texts_BD.T, texts_nD @ images_BD.T
        relevance = None
        if self.captions is not None:
            relevance = self._relevance(batch, same_nB, i2t.device)
        terms = {}
        for name, settings in self._settings_at(epoch).items():
            weight = settings.pop("weight", 1.0)
            targets = relevance if name in GRADED else (same_nB, same_nB)
            values = [
                LOSSES[name](scores, target, **settings)
                for scores, target in zip((i2t, t2i), targets, strict=True)
            ]
            terms[name] = (values[0].mean() + values[1].mean()) / 2 * weight
        return sum(terms.values()), terms

    def _settings_at(self, epoch: float) -> dict[str, dict]:
        """Each loss's settings now: a triplet that starts on the hardest negatives collapses."""
        settings = {name: dict(values) for name, values in self.settings.losses.items()}
        if "triplet" in settings and epoch < self.settings.negatives_warmup:
            settings["triplet"]["negatives"] = "all"
        return settings

    def _relevance(self, batch: Batch, same_nB, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Relevance (n, B) of own images to all texts, and of own texts to all images."""
        images = [self.captions.image_ids[row] for row in batch.image_rows.tolist()]
        rows_nC, mask_nC = self.captions.captions_of(images)
        texts_BE = self.world.gather(self.captions.vectors[batch.caption_rows].to(device))
        i2t_nB = graded(
            self.captions.vectors[rows_nC].to(device),
            texts_BE,
            self.label,
            mask_MC=mask_nC.to(device),
            same_image_MN=same_nB,
        )
        # r is not symmetric: own texts' column of the whole matrix, whose rows are all images.
        n = len(images)
        own = slice(self.world.rank * n, (self.world.rank + 1) * n)
        return i2t_nB, self.world.gather(i2t_nB)[:, own].T


def _caption_ids(split: Split) -> list[str]:
    return split.table["captions"].combine_chunks().flatten().field("caption_id").to_pylist()
