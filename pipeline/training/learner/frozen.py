"""Frozen towers in training: whether their vectors are kept, and how these are made."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pipeline.errors import InputError
from pipeline.models import Vocabulary
from pipeline.models.tuning.modes import FrozenPart
from pipeline.models.two_tower import TwoTower
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.storage import store
from pipeline.training import checkpoint
from pipeline.training.data import Split
from pipeline.training.learner.sharding import gathered_no_more
from pipeline.training.learner.step import Learner
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.frozen import FrozenVectors, InOrder, filled
from pipeline.training.loading.loader import Loader
from pipeline.training.sampler import Sampler
from schemas.settings import Recipe

# Settings of the model that the other side's vectors do not follow from; what a tower's settings
# make of its weights is in these.
TUNING = {"tune_image", "tune_text", "freeze", "layer_decay", "lora_rank", "gradient_checkpointing"}
TUNING |= {"projection", "dropout"}  # of what follows the frozen part
OTHERS = {
    "image": {"text", "word_dim", "text_pooling", "min_word_count", "max_words"},
    "text": {"image", "image_size", "width", "image_pooling", "efficientnet"},
}
OrderOf = Callable[[Split, InOrder], Loader]  # a loader of pictures


def parts_of(model: TwoTower, recipe: Recipe, order: Sampler) -> dict[str, FrozenPart]:
    """The frozen parts, by side, whose vectors are kept in a training of that order.

    Where it pays, unless told otherwise: where more is encoded than there is to encode. None of
    images that are shown in other ways each time.
    """
    settings = recipe.train
    if settings.frozen_vectors == "off":
        return {}
    shown = settings.epochs * order.steps * order.batch_size
    there = {"image": len(order.split), "text": len(order.split.captions)}
    found = {}
    for side, tuned in model.tuned.items():
        part = FrozenPart.of(getattr(model, side), tuned)
        if side == "image" and Augment.of(settings) is not None:
            part = None
        if part and (settings.frozen_vectors == "on" or shown > there[side]):
            found[side] = part
    if settings.frozen_vectors == "on" and not found:
        raise InputError(
            "train.frozen_vectors is on, and no tower gives an input the same vector at every "
            "step: set model.tune_image to {mode: frozen}, without crop, flip, colour and "
            "patch_dropout, or model.tune_text; or leave it at auto"
        )
    return found


class FrozenTowers:
    """What the frozen towers of a training made of its splits."""

    def __init__(
        self,
        parts: dict[str, FrozenPart],
        learner: Learner,
        recipe: Recipe,
        vocabulary: Vocabulary | PretrainedTokens,
        loader_of: OrderOf,
    ):
        self.parts, self.learner, self.recipe = parts, learner, recipe
        self.vocabulary, self.loader_of = vocabulary, loader_of
        self.identities: dict[str, str] = {}

    def vectors_of(self, split: Split, sides: Sequence[str]) -> dict[str, FrozenVectors]:
        """The vectors of a split by side, of those `sides` that are frozen. Every worker calls it.

        Made where they are not there. Not before the weights are those of the training.
        """
        found = {}
        for side in sides:
            if side not in self.parts:
                continue
            limit = self.recipe.train.cache_gb * 1e9
            vectors = FrozenVectors(split, side, self._identity(side, split), limit)
            if missing := vectors.look(self.learner.world):
                self._make(vectors, missing)
            found[side] = vectors
        return found

    def _identity(self, side: str, split: Split) -> str:
        """A hash of all that a side's vectors follow from, beside the data.

        How pictures are made ready is seen by what the tower gets of the first one.
        """
        if side not in self.identities:
            part, settings = self.parts[side], self.recipe.model.told()
            own = {k: v for k, v in settings.items() if k not in TUNING | OTHERS[side]}
            words = self.vocabulary.state if side == "text" else None
            shown = store.sha256(split.image(0).tobytes()) if side == "image" else None
            weights = checkpoint.identity(part.tensors())
            kind = f"{type(part.tower).__module__}.{type(part.tower).__qualname__} {part.whole}"
            about = [kind, own, weights, self.recipe.train.precision, words, shown]
            self.identities[side] = store.fingerprint("frozen", *about)
        return self.identities[side]

    def _make(self, vectors: FrozenVectors, missing: list[int]) -> None:
        learner, world = self.learner, self.learner.world
        counts = [len(filled(vectors.rows, shard)) for shard in missing]
        shares = [sum(counts[rank :: world.size]) for rank in range(world.size)]
        # Weights that are spread out are gathered by all workers at once, equally often.
        idle = max(shares) - shares[world.rank] if learner.sharded else 0
        inputs = self._images if vectors.side == "image" else self._texts
        part = self.parts[vectors.side]

        def encoded(shards: tuple[int, ...]) -> Iterator[torch.Tensor]:
            for given in inputs(vectors, shards, idle):
                with torch.no_grad(), learner.arithmetic.forward():
                    made = part(*given)
                yield made

        learner.parallel.train()  # what is frozen runs as in evaluation
        vectors.make(missing, encoded, world)
        gathered_no_more(learner.model)

    def _images(
        self, vectors: FrozenVectors, shards: tuple[int, ...], idle: int
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        if not shards and not idle:
            return
        loader = self.loader_of(vectors.split, InOrder(vectors.split, shards, idle))
        try:
            for batch in loader.epoch(0):
                yield (batch.images.to(self.learner.world.device),)
        finally:
            loader.close()

    def _texts(
        self, vectors: FrozenVectors, shards: tuple[int, ...], idle: int
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        batches = [rows for shard in shards for rows in filled(vectors.rows, shard)]
        batches += idle * [filled(vectors.rows, 0)[0]]
        for rows in batches:
            texts = vectors.split.texts(np.asarray(rows))
            words, lengths = self.vocabulary.encode(texts, self.recipe.model.max_words)
            yield words.to(self.learner.world.device), lengths
