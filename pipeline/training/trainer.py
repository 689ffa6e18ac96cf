"""Two towers as the training loop sees them: their data, their learner, and their val split."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors.torch import save

from pipeline import models
from pipeline.errors import InputError
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions, StoredCaptions
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import RunFolder
from pipeline.training.checkpoint import Tensors, frozen, put_weights, trained
from pipeline.training.data import Batch, Split, cut_captions, word_counts
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner, NotFinite
from pipeline.training.learner.frozen import FrozenTowers, parts_of
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.frozen import InOrder, VectorSplit
from pipeline.training.loading.loader import Loader, workers_for
from pipeline.training.loop import Course
from pipeline.training.neighbours import Neighbours
from pipeline.training.objective import Objective, needs_embeddings, needs_relevance
from pipeline.training.sampler import Sampler
from pipeline.training.weights import norms, published, validation
from schemas.checkpoint import Checkpoint
from schemas.settings import Recipe, TrainSettings

SPARE = 4  # neighbours known for each place of a group: some are taken when its turn comes
COLLAPSED = 0.99  # mean cosine of a batch's images or texts above which they are all one


class TowerTrainer:
    """A `Trainer` of two towers, new ones, on the data of the piece's recipe.

    Without `keep` nothing is written, not even what any training would find again.
    """

    def __init__(self, piece: Piece, world: ProcessGroup, *, keep: bool = True):
        self.piece, self.world, root = piece, world, piece.inputs["root"]
        self.recipe: Recipe = piece.inputs["recipe"]
        self.settings, model = self.recipe.train, self.recipe.model
        s = self.settings
        _check_lanes(s, world)
        torch.manual_seed(s.seed)
        with _told():
            how = self.preprocessing = models.preprocessing_of(model)
        read = partial(Split, root, preprocessing=how, copies_gb=s.cache_gb)
        self.train_split = read("train")
        of_val = run_folder.of_split(RunFolder(root).index("shard"), "val")
        self.val_split = read("val") if any(entry["samples"] for entry in of_val) else None
        asked = s.select == "best_ndcg" and self.val_split is not None
        val = embed.of_shards(self.recipe, root, "val")[0] if asked else None
        self.val_captions = None if val is None else Captions.read(val)
        label_version, near, known = self._embeddings(keep)
        with _told():
            words = models.vocabulary_for(
                model, partial(word_counts, self.train_split, world, keep)
            )
            self.architecture = models.architecture(model)  # of pretrained towers
            features = self.train_split.features
            towers = models.build(model, vocabulary=words, features=features, preprocessing=how)
        self.objective = Objective(s, self.recipe.label, known, world, towers.came_with)
        towers.learned.update(self.objective.parameters)
        self.vocabulary = words
        first = world.rank == 0
        self.cut = cut_captions(self.train_split, words, model.max_words) if first else (0, 0)
        self.vocabulary_state: list | dict | None = words.state
        self.order = self._order(near)
        self.steps = self.order.steps
        parts = parts_of(towers, self.recipe, self.order) if keep else {}
        self.loader = self._loader(decodes="image" not in parts)
        self.learner = Learner(towers, self.objective, s, world, self.steps)
        self.frozen_towers = FrozenTowers(
            parts, self.learner, self.recipe, words, self._loader_in_order
        )
        self.course = _course(self.recipe)
        self.about: dict[str, Any] = self._about(label_version)

    def _embeddings(
        self, keep: bool
    ) -> tuple[str | None, Neighbours | None, StoredCaptions | None]:
        """Of the train captions: their version, near ones and vectors, where those are needed."""
        s, root = self.settings, self.piece.inputs["root"]
        if not needs_embeddings(s):
            return None, None, None
        of_shards = embed.of_shards(self.recipe, root, "train")
        limit = s.cache_gb * 1e9
        found = Neighbours(*of_shards, SPARE * s.neighbours, limit)
        near = _near(found, s.neighbours, self.world, keep)
        known = StoredCaptions(*of_shards, limit) if needs_relevance(s) else None
        return of_shards[0].version, near, known

    def _about(self, label_version: str | None) -> dict[str, Any]:
        """What every checkpoint says of the training."""
        return {
            "settings": self.recipe.model_dump(mode="json"),
            "data_version": self.piece.inputs["data"],
            "label_version": label_version,
            "order": self.order.version,
            "base": self.learner.base,
        }

    def _order(self, near: Neighbours | None) -> Sampler:
        """The pairs of every step, which are near to each other if the recipe asks so."""
        s = self.settings
        return Sampler(
            self.train_split,
            batch_size=s.batch_size,
            lanes=s.lanes,
            pairs=s.pairs,
            seed=s.seed,
            group=s.neighbours,
            neighbours=near,
        )

    def _loader(self, decodes: bool) -> Loader:
        """The batches of this worker."""
        s, augment = self.settings, Augment.of(self.settings)
        how = {"epochs": s.epochs, "here": self.world.size_here}
        workers = workers_for(self.train_split, augment, asked=s.decode_workers, **how)
        return Loader(
            self.order,
            self.vocabulary,
            rank=self.world.rank,
            size=self.world.size,
            max_words=self.recipe.model.max_words,
            workers=workers if decodes else 0,
            augment=augment,
            epochs=s.epochs,
            device=self.world.device,
        )

    def _loader_in_order(self, split: Split, order: InOrder) -> Loader:
        """The pictures of some shards, once."""
        how = {"epochs": 1, "here": self.world.size_here}
        workers = workers_for(split, None, asked=self.settings.decode_workers, **how)
        words, device = self.recipe.model.max_words, self.world.device
        given: dict[str, Any] = {"max_words": words, "workers": workers, "device": device}
        return Loader(order, self.vocabulary, rank=0, size=1, **given)

    def _take_vectors(self) -> None:
        """What frozen towers make of the splits comes in place of pictures and words."""
        frozen_towers = self.frozen_towers
        if not frozen_towers.parts or self.loader.given:
            return
        self.loader.given = frozen_towers.vectors_of(self.train_split, ["image", "text"])
        if self.val_split is not None:
            of_val = frozen_towers.vectors_of(self.val_split, ["image"])
            if "image" in of_val:
                self.val_split = VectorSplit(self.val_split, of_val["image"])
        self.learner.model.given = frozen_towers.parts

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._take_vectors()
        self.learner.parallel.train()
        return self.loader.epoch(epoch, start)

    def loading(self) -> tuple[float, float]:
        return self.loader.spent()

    def close(self) -> None:
        """End the processes that make batches."""
        self.loader.close()

    def pairs(self, batch: Batch) -> int:
        return len(batch) * self.world.size

    def step(self, batch: Batch, number: int) -> Callable[[], dict[str, float]]:
        try:
            return self.learner.step(batch, number)
        except NotFinite as error:
            raise InputError(f"{error}; {self._keep(error)}") from error

    def _keep(self, error: NotFinite) -> str:
        """Keep the batch of a step that was not finite; where it lies."""
        folder = self.piece.output.rsplit("/", 1)[0]
        uri = store.join(folder, f"not-finite-{error.step}-{self.world.rank}.safetensors")
        tensors = {k: v.cpu().contiguous() for k, v in error.batch.tensors().items()}
        store.write_bytes(uri, save(tensors, {"step": str(error.step)}))
        return f"its batch is kept in {uri}"

    def of_epoch(self, record: dict[str, float]) -> dict[str, float]:
        """What the losses learned by now, and whether the towers collapsed.

        1 if all images or all texts are encoded alike, of which no loss recovers by itself.
        """
        cosines = [record[f"train/mean_cosine_{side}"] for side in ("images", "texts")]
        learned = {name: record[name] for name in self.objective.names if name in record}
        return {"train/collapsed": float(max(cosines) > COLLAPSED), **learned}

    def validate(self) -> dict[str, float]:
        if self.val_split is None:
            return {}
        self._take_vectors()
        with self.learner.as_evaluated():
            return self._measured()

    def _measured(self) -> dict[str, float]:
        assert self.val_split is not None
        towers, given = self.learner.model, (self.val_split, self.world, self.recipe)
        return validation.measure(towers, self.vocabulary, *given, self.val_captions)

    def validate_with(self, weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        """Figures on val of other weights, and these with the batch norms' moments made anew.

        They stay in the towers: training is over. Every worker calls it.
        """
        self.learner.averages = []
        put_weights(self.learner.model, weights)
        given = self.vocabulary, self.train_split, self.recipe, self.world.device
        with self.learner.as_evaluated():
            moments = norms.renew(self.learner.model, *given)
            return self._measured(), {**weights, **moments}

    def trained(self) -> dict[str, torch.Tensor]:
        """The very weights and buffers that training changes; of sharded ones this worker's."""
        return trained(self.learner.model)

    def frozen(self) -> dict[str, torch.Tensor]:
        return frozen(self.learner.model)

    def state(self) -> tuple[Tensors, dict]:
        try:
            self.learner.check()
        except NotFinite as error:
            raise InputError(f"{error}; {self._keep(error)}") from error
        return self.learner.state()

    def restore(self, checkpoint: Checkpoint, files: Tensors) -> None:
        kept = files, checkpoint.optimizer, checkpoint.base
        try:
            if self.frozen_towers.parts:  # frozen weights may come with the checkpoint
                self.learner.restore(*kept)
                self._take_vectors()
            if self.world.together and self.settings.sharding == "ddp":
                self.learner.settle(next(self.loader.epoch(0)))
            self.learner.restore(*kept)
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(
                f"the checkpoint of step {checkpoint.step} does not fit: other towers, words or "
                f"optimizer ({str(error).splitlines()[0]}); train without --resume"
            ) from error
        self.about["base"] = self.learner.base

    def same_batches(self, checkpoint: Checkpoint) -> bool:
        then = checkpoint.settings["train"]
        names = ("batch_size", "lanes", "pairs", "neighbours", "seed")
        same = all(then[name] == getattr(self.settings, name) for name in names)
        same = same and checkpoint.order == self.order.version
        return same and checkpoint.data_version == self.piece.inputs["data"]

    def summary(self, chosen: Checkpoint, records: list[dict], torn: list[str]) -> dict:
        ends = [record for record in records if "epoch" in record]
        return {
            "epoch": chosen.epoch,
            "torn_checkpoints": torn,
            "collapsed": [r["epoch"] for r in ends if r.get("train/collapsed")],
            "metrics": chosen.metrics,
            **published.described(
                *(self.piece.inputs["root"], self.learner.model, self.train_split.features),
                *(self.architecture, self.preprocessing, self.about["settings"]),
            ),
            **({"frozen": sorted(self.loader.given)} if self.loader.given else {}),
            **({"cut_captions": self.cut} if self.cut[0] else {}),
            **({"not_compiled": self.learner.not_compiled} if self.learner.not_compiled else {}),
        }


def _check_lanes(s: TrainSettings, world: ProcessGroup) -> None:
    if s.lanes % world.size:
        raise InputError(
            f"train.lanes {s.lanes} do not share out among {world.size} workers; choose lanes "
            "that their number divides"
        )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What towers find wrong with their settings is an error that a person can act on."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def _course(recipe: Recipe) -> Course:
    s, model = recipe.train, recipe.model
    return Course(
        *(s.epochs, s.select, s.patience, s.log_every, s.checkpoint_every, s.resume),
        before=model.image == model.text == "pretrained",
        stop_below=s.stop_below,
        keep_epochs=s.keep_epochs,
    )


def _near(neighbours: Neighbours, group: int, world: ProcessGroup, keep: bool) -> Neighbours | None:
    """The neighbours, which the workers search for together where that was not done before."""
    if group == 1:
        return None
    neighbours.find(range(world.rank, len(neighbours.files), world.size), keep)
    world.barrier()
    return neighbours
