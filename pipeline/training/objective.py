"""The training objective: a weighted sum of losses over the list of the whole global batch.

What workers send each other is vectors. Scores and relevance of a worker's own lists are made a
block of lists at a time, so neither is ever whole.

Legend of the shape suffixes: n own pairs, B pairs of the global batch, D width of the towers'
vectors, C captions of an image, E width of a caption's vector, R own lists of a block.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError, did_you_mean
from pipeline.formulas.losses import LOSSES, Learned, WeightedSum, loss_named
from pipeline.formulas.relevance import from_captions
from pipeline.formulas.streaming import lists_streamed
from pipeline.labels.caption_vectors import Captions, StoredCaptions
from pipeline.labels.maps import cosine_map
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from schemas.settings import LabelSettings, TrainSettings


def check(settings: TrainSettings) -> None:
    """Refuses losses that do not exist, and settings that they do not have or cannot work with."""
    if not settings.losses:
        raise InputError(f"train.losses is empty; choose from {', '.join(LOSSES)}")
    for name, given in settings.losses.items():
        if name not in LOSSES and ":" not in name:
            raise InputError(f"unknown loss {name!r} in train.losses{did_you_mean(name, LOSSES)}")
        if given.get("average") == "pairs":  # each worker has queries of its own only
            raise InputError(
                f"train.losses.{name}.average is 'pairs', which needs all queries in one process; "
                "use 'queries'"
            )
        try:  # on a list of two, at both ends of every schedule: before any work
            loss, two = _trial(settings.losses, name), torch.eye(2)
            for time in (-math.inf, math.inf):
                value = float(loss(two, two > 0, two, time=time).sum().detach())
                if not math.isfinite(value):
                    raise ValueError(f"{given} gives {value} on a list of two; change its settings")
        except (TypeError, ValueError) as error:
            raise InputError(f"train.losses.{name}: {error}") from error


def _trial(losses: dict[str, dict[str, Any]], name: str) -> WeightedSum:
    """One of the losses, what of it is learned at its start."""
    learned = Learned(losses)
    values = learned.values(learned.parameters())
    own = {key: value for key, value in values.items() if key[0] == name}
    return WeightedSum({name: learned.losses[name]}).having(own)


def loss_of(
    settings: TrainSettings, losses: Mapping[str, dict[str, Any]] | None = None
) -> WeightedSum:
    """The weighted sum, times in epochs; a triplet starts on all negatives.

    On the hardest ones from the first step it collapses, so that its mining waits, unless the
    recipe says how it goes. `losses` are the settings' with numbers for what is learned.
    """
    losses = dict(Learned(settings.losses).losses if losses is None else losses)
    if "triplet" in losses:
        wait = {"from": 0, "to": 1, "over": settings.negatives_warmup, "shape": "jump"}
        losses["triplet"] = {"mining": wait, **losses["triplet"]}
    return WeightedSum(losses)


def needs_relevance(settings: TrainSettings) -> bool:
    return any(loss_named(name).graded for name in settings.losses)


Decided = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns and relevance of pairs


class Objective:
    """Loss of one worker's pairs against the global batch, both directions.

    What the recipe's losses learn is in `parameters`, which are the model's: `TwoTower.learned`.
    Their gradient is that of own pairs' loss: the mean over the workers is the global batch's.
    """

    def __init__(
        self,
        settings: TrainSettings,
        label: LabelSettings,
        captions: StoredCaptions | Captions | None,
        world: ProcessGroup,
        came_with: Mapping[str, float] | None = None,  # what a pretrained model learned
    ):
        self.world, self.rows = world, settings.list_rows or None
        self.learned = Learned(settings.losses, came_with)
        self.loss = loss_of(settings, self.learned.losses)
        self.parameters: Mapping[str, Tensor] = self.learned.parameters()
        self.relevance = None if captions is None else Relevance(captions, label, world)

    @property
    def names(self) -> list[str]:
        """What records call that which is learned, and what follows it."""
        of = self.learned
        both = [(x.loss, x.name) for x in of.settings] + [(x.loss, x.name) for x in of.followers]
        return [f"train/{loss}_{name}" for loss, name in both]

    def __call__(
        self, images_nD: Tensor, texts_nD: Tensor, batch: Batch, epoch: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and its terms; every worker's share of the global list's loss."""
        gather, image_n = self.world.gather, batch.image_rows
        image_B = gather(image_n)
        graded = self.relevance is not None and self.loss.graded_at(epoch)
        relevance = self.relevance.of_batch(batch, image_B) if graded else None

        values = self.learned.values(self.parameters)
        loss = self.loss.having(values)
        # Products of unit vectors are never -inf, and in [-1, 1].
        each = functools.partial(loss.each, time=epoch, scored=True, score_range=2.0)

        def of_images(rows: slice) -> tuple[Tensor, Tensor | None]:
            same_RB = image_n[rows, None] == image_B
            return same_RB, relevance.of_images(rows, same_RB) if relevance else None

        def of_texts(rows: slice) -> tuple[Tensor, Tensor | None]:
            same_RB = image_n[rows, None] == image_B
            return same_RB, relevance.of_texts(rows, same_RB) if relevance else None

        how: dict[str, Any] = {"rows": self.rows, "learned": loss.learned}
        i2t, of_i2t = lists_streamed(each, images_nD, gather(texts_nD), of_images, **how)
        t2i, of_t2i = lists_streamed(each, texts_nD, gather(images_nD), of_texts, **how)
        terms = {name: (of_i2t[name] + of_t2i[name]) / 2 for name in of_i2t}
        return (i2t + t2i) / 2, terms | self.learned.told(values)


class Relevance:
    """Relevance within global batches, from the vectors of their captions."""

    def __init__(
        self, captions: StoredCaptions | Captions, label: LabelSettings, world: ProcessGroup
    ):
        self.captions, self.world = captions, world
        self.map = _on_device(cosine_map(label), world.device)
        self.reduce, self.decided = label.reduce, captions.decided(label)

    def of_batch(self, batch: Batch, image_B: Tensor) -> "BatchRelevance":
        """That of a batch; `image_B` says which images of the global batch are the same."""
        return BatchRelevance(self, batch.caption_rows.cpu(), image_B)


class BatchRelevance:
    """Relevance of own images to all texts, and of own texts to all images, by blocks.

    It is not symmetric: that of an image to a text is by all captions of the image. So own images'
    relevance to the texts of the others is sent to those, whose lists it is in: 4 n B bytes, a
    block at a time. Sending all captions of all images instead would take 4 B C E bytes, less for
    shares of n > C E, and hold them all on every worker. Where every image has one caption it is
    symmetric, and nothing is sent.
    """

    def __init__(self, relevance: Relevance, caption_rows: Tensor, image_B: Tensor):
        self.how, self.world = relevance, relevance.world
        found = relevance.captions.of_pairs(caption_rows)
        self.images_nCE, texts_nE = (_to(x, image_B.device) for x in (found[0], found[2]))
        self.mask_nC = None if found[1].numpy().all() else _to(found[1], image_B.device)
        self.texts_BE, self.image_B = self.world.gather(texts_nE), image_B
        self.mine = slice(self.world.rank * len(texts_nE), (self.world.rank + 1) * len(texts_nE))
        self.single = relevance.captions.single
        self.whole: Tensor | None = None
        # Of own images and all texts; where relevance is symmetric of own texts and all images too.
        self.decided: Decided | None = None
        self.decided_texts: Decided | None = None
        if len(relevance.decided[0]):
            self._look_up(caption_rows, relevance)

    def _look_up(self, caption_rows: Tensor, relevance: Relevance) -> None:
        """Which of the decided pairs are in the batch; their rows are needed on the host."""
        all_rows = self.world.gather(caption_rows.to(self.image_B.device)).cpu().numpy()
        own_rows, images_of = caption_rows.numpy(), relevance.captions.images_of
        self.decided = _met(relevance.decided, images_of(own_rows), all_rows)
        image, text, value = _met(relevance.decided, images_of(all_rows), own_rows)
        self.decided_texts = text, image, value

    def of_images(self, rows: slice, same_RB: Tensor) -> Tensor:
        """Relevance (R, B) of own images to all texts."""
        relevance_RB = self._from_captions(rows, self.texts_BE, same_RB)
        self._decide(relevance_RB, self.decided, rows)
        if len(relevance_RB) == len(self.images_nCE):  # the texts' turn needs no other
            self.whole = relevance_RB
        return relevance_RB

    def of_texts(self, rows: slice, same_RB: Tensor) -> Tensor:
        """Relevance (R, B) of own texts to all images."""
        if self.single:
            if self.whole is not None and self.decided is None:
                return self.whole
            relevance_RB = self._from_captions(rows, self.texts_BE, same_RB)
            self._decide(relevance_RB, self.decided_texts, rows)
            return relevance_RB
        size, n = self.world.size, len(self.images_nCE)
        relevance_nX = self.whole if self.whole is not None else self._to_texts(rows)
        # The texts' owners, and for each the relevance of own images to its texts of this block.
        parts = relevance_nX.view(n, size, -1).transpose(0, 1).contiguous()
        self.whole = relevance_nX = None
        return self.world.exchange(parts).flatten(0, 1).T.contiguous()

    def _to_texts(self, rows: slice) -> Tensor:
        """Relevance of own images to these rows of every worker's texts, rank after rank."""
        size, n = self.world.size, len(self.images_nCE)
        texts_XE = self.texts_BE.view(size, n, -1)[:, rows].flatten(0, 1)
        same_nX = self.image_B[self.mine, None] == self.image_B.view(size, n)[:, rows].flatten()
        relevance_nX = self._from_captions(slice(None), texts_XE, same_nX)
        if self.decided is not None:
            row, column, value = self.decided
            rank, place = np.divmod(column, n)
            kept = (place >= rows.start) & (place < rows.stop)
            where = row[kept], rank[kept], place[kept] - rows.start
            _put(relevance_nX.view(n, size, -1), where, value[kept])
        return relevance_nX

    def _from_captions(self, rows: slice, texts_NE: Tensor, same_RN: Tensor) -> Tensor:
        return from_captions(
            self.images_nCE[rows],
            texts_NE,
            map=self.how.map,
            reduce=self.how.reduce,
            mask_MC=None if self.mask_nC is None else self.mask_nC[rows],
            same_image_MN=same_RN,
            unit=True,
        )

    def _decide(self, relevance_RB: Tensor, decided: Decided | None, rows: slice) -> None:
        """Put in what was decided of these rows."""
        if decided is not None:
            row, column, value = decided
            kept = (row >= rows.start) & (row < rows.stop)
            _put(relevance_RB, (row[kept] - rows.start, column[kept]), value[kept])


def _put(relevance: Tensor, where: tuple[np.ndarray, ...], value: np.ndarray) -> None:
    device = relevance.device
    places = tuple(torch.from_numpy(x).to(device) for x in where)
    relevance[places] = torch.from_numpy(value).to(device)


def _to(vectors: Tensor, device: torch.device) -> Tensor:
    """On the device; it is not waited for."""
    pinned = vectors.pin_memory() if device.type == "cuda" else vectors
    return pinned.to(device, non_blocking=True)


def _on_device(map: Callable, device: torch.device) -> Callable:
    """The map with its knots on the device: no block has to send them there."""
    if not isinstance(map, functools.partial):
        return map
    settings = map.keywords.items()
    there = {k: torch.tensor(v, device=device) for k, v in settings if isinstance(v, tuple)}
    return functools.partial(map.func, **{**map.keywords, **there})


def _met(decided: Decided, image_rows: np.ndarray, caption_rows: np.ndarray) -> Decided:
    """Where the decided pairs (image, caption, relevance) stand in a matrix of such rows."""
    image_P, caption_P, value_P = decided
    met = np.isin(image_P, image_rows) & np.isin(caption_P, caption_rows)
    found: list[tuple] = []
    for image, caption, value in zip(image_P[met], caption_P[met], value_P[met], strict=True):
        rows, columns = np.flatnonzero(image_rows == image), np.flatnonzero(caption_rows == caption)
        found += [(int(row), int(column), value) for row in rows for column in columns]
    row, column, value = (np.array([x[k] for x in found]) for k in range(3))
    return row.astype(np.int64), column.astype(np.int64), value.astype(np.float32)


def needs_embeddings(settings: TrainSettings) -> bool:
    """Whether captions' vectors are used: by a graded loss or choice, or to find neighbours."""
    return needs_labels(settings) or settings.neighbours > 1


def needs_labels(settings: TrainSettings) -> bool:
    """Whether relevance is used: by a graded loss, or to choose the best checkpoint."""
    return needs_relevance(settings) or settings.select == "best_ndcg"
