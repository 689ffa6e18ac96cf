"""A training in progress: its data, its learner, and how far it is."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import save

from pipeline import models
from pipeline.errors import InputError
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.retrieval import nearest
from pipeline.storage import run_folder, store
from pipeline.storage.plan import Piece
from pipeline.storage.run_folder import Files
from pipeline.training import checkpoint as checkpoint_files
from pipeline.training import validation
from pipeline.training.augmentation import Augment
from pipeline.training.data import Batch, Split
from pipeline.training.distributed import ProcessGroup
from pipeline.training.learner import Learner, NotFinite
from pipeline.training.loader import Loader
from pipeline.training.objective import Objective, needs_embeddings, needs_relevance
from pipeline.training.sampler import Sampler
from schemas.settings import Recipe

Report = Callable[[list[dict]], None]  # takes new records, from every worker
SPARE = 4  # neighbours known for each place of a group: some are taken when its turn comes
COLLAPSED = 0.99  # mean cosine of a batch's images or texts above which they are all one
CHOSEN_BY = {"best": "val/rsum", "best_ndcg": "val/ndcg_label"}  # the higher the better


@dataclass
class Trainer:
    """Epochs of steps with a checkpoint after each, and from any checkpoint on."""

    piece: Piece
    world: ProcessGroup
    report: Report
    leaving: Callable[[], bool]  # whether this node is about to be taken away
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    best: dict = field(default_factory=lambda: {"step": 0, "epoch": 0})
    records: list[dict] = field(default_factory=list)  # by step, all of them
    reported: int = 0  # records that were handed on
    torn: list[str] = field(default_factory=list)  # checkpoints that could not be read

    def __post_init__(self):
        recipe: Recipe = self.piece.inputs["recipe"]
        self.recipe, self.settings = recipe, recipe.train
        self.root = self.piece.inputs["root"]
        self._check_storage()
        torch.manual_seed(self.settings.seed)
        size = recipe.model.image_size
        read = {"image_size": size, "copies_gb": self.settings.cache_gb}
        self.train_split = Split(self.root, "train", **read)
        self.val_split = _split_if_any(self.root, "val", **read)
        captions, self.label_version = _embeddings(recipe, self.root, "train")
        self.val_captions = None
        if self.settings.select == "best_ndcg" and self.val_split is not None:
            self.val_captions, _ = _embeddings(recipe, self.root, "val")
        known = captions if needs_relevance(self.settings) else None
        objective = Objective(self.settings, recipe.label, self.train_split, known, self.world)
        try:
            self.vocabulary = models.vocabulary_for(recipe.model, self.train_split.captions)
            self.architecture = models.architecture(recipe.model)
            model = models.build(
                recipe.model, vocabulary=self.vocabulary, features=self.train_split.features
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.order = Sampler(
            self.train_split,
            batch_size=self.settings.batch_size,
            lanes=self.settings.lanes,
            pairs=self.settings.pairs,
            seed=self.settings.seed,
            group=self.settings.neighbours,
            neighbours=_near(captions, self.settings.neighbours),
        )
        self.loader = Loader(
            self.order,
            self.vocabulary,
            rank=self.world.rank,
            size=self.world.size,
            max_words=recipe.model.max_words,
            threads=self.settings.decode_threads,
            augment=Augment.of(self.settings),
        )
        self.learner = Learner(model, objective, self.settings, self.world, self.order.steps)
        self._resume()

    @property
    def folder(self) -> str:
        return self.piece.output.rsplit("/", 1)[0]

    @property
    def checkpoints(self) -> str:
        return store.join(self.folder, "checkpoints")

    @property
    def over(self) -> bool:
        """All epochs are done, or val has not become better for `patience` of them."""
        stale = self.settings.patience and self.epoch - self.best["epoch"] >= self.settings.patience
        return self.epoch >= self.settings.epochs or bool(stale and self.val_split is not None)

    def run_epoch(self) -> None:
        """Train to the end of the epoch, validate, write a checkpoint, report."""
        started, waited, first = time.perf_counter(), 0.0, self.step
        steps = self.order.steps
        self.learner.parallel.train()
        for batch in self.loader.epoch(self.epoch, start=self.step - self.epoch * steps):
            waited += batch.waited
            record = self._step(batch)
            logged = self.step % self.settings.log_every == 0
            if logged:
                self.records.append({"step": self.step, **record()})
            if self.step < (self.epoch + 1) * steps and self._checkpoint_due(logged):
                self._write_checkpoint({})
        seconds = time.perf_counter() - started
        self.epoch += 1
        summary = {
            "step": self.step,
            "epoch": self.epoch,
            "train/samples_per_second": (self.step - first) * self.settings.batch_size / seconds,
            "train/data_wait": waited / seconds,
            **self._collapse(record()),
            **self._validate(),
        }
        self.records.append(summary)
        name = CHOSEN_BY.get(self.settings.select, "val/rsum")
        score = summary.get(name, 0.0)
        if score > self.best.get(name, -1.0) or self.settings.select == "last":
            self.best = {"step": self.step, "epoch": self.epoch, name: score}
        self._write_checkpoint(summary)

    def _step(self, batch: Batch) -> Callable[[], dict]:
        try:
            record = self.learner.step(batch, self.step)
        except NotFinite as error:
            raise InputError(f"{error}; {self._keep(error)}") from error
        self.step += 1
        return record

    def _keep(self, error: NotFinite) -> str:
        """Keep the batch of a step that was not finite; where it lies."""
        uri = store.join(self.folder, f"not-finite-{error.step}-{self.world.rank}.safetensors")
        tensors = {k: v.cpu().contiguous() for k, v in error.batch.tensors().items()}
        store.write_bytes(uri, save(tensors, {"step": str(error.step)}))
        return f"its batch is kept in {uri}"

    def _checkpoint_due(self, logged: bool) -> bool:
        every = self.settings.checkpoint_every
        # Only where records are read anyway: asking waits for every worker.
        return bool(every and self.step % every == 0) or (logged and self.leaving())

    def _collapse(self, record: dict) -> dict[str, float]:
        """1 if all images or all texts are encoded alike, of which no loss recovers by itself."""
        cosines = [record[f"train/mean_cosine_{side}"] for side in ("images", "texts")]
        return {"train/collapsed": float(max(cosines) > COLLAPSED)}

    def _validate(self) -> dict[str, float]:
        if self.val_split is None:
            return {}
        with self.learner.as_evaluated():
            images, texts, owners = validation.encode_split(
                self.learner.model,
                self.vocabulary,
                self.val_split,
                self.world,
                max_words=self.recipe.model.max_words,
            )
        metrics = validation.recalls(images, texts, owners)
        if self.val_captions is not None:
            metrics |= validation.ndcg_on_val(images, texts, self.val_captions, self.recipe.label)
        return metrics

    def _write_checkpoint(self, metrics: dict) -> None:
        """Write where training is, then report; a report that is lost is made up for by the end."""
        try:
            self.learner.check()
        except NotFinite as error:
            raise InputError(f"{error}; {self._keep(error)}") from error
        tensors, rest = self.learner.state()
        if self.world.rank == 0:
            about = {
                "fingerprint": self.piece.fingerprint,
                "epoch": self.epoch,
                "step": self.step,
                "metrics": {k: float(v) for k, v in metrics.items()},
                "best": self.best,
                "settings": self.recipe.model_dump(mode="json"),
                "data_version": self.piece.inputs["data"],
                "label_version": self.label_version,
                "optimizer": rest,
                "records": self.records,  # those beside it may be another try's, not yet dead
            }
            store.write_json(store.join(self.checkpoints, "records.json"), self.records)
            checkpoint_files.write(self.checkpoints, about, tensors, self.vocabulary.state)
        self.world.barrier()
        self.report(self.records[self.reported :])
        self.reported = len(self.records)

    def _resume(self) -> None:
        """Go on from this training's newest checkpoint, else from the one of `train.resume`."""
        found, self.torn = checkpoint_files.latest(self.checkpoints)
        mine = found is not None and found[0].fingerprint == self.piece.fingerprint
        given = self.settings.resume
        elsewhere = not mine and given not in (None, "latest")
        if elsewhere and (found := checkpoint_files.read(given)) is None:
            raise InputError(f"train.resume {given} is no whole checkpoint; give its folder")
        if found is None or not (mine or given):
            if self.world.rank == 0:  # what lies here belongs to other settings
                store.remove(self.checkpoints)
            self.world.barrier()
            return
        checkpoint, files = found
        if self.world.together and self.settings.sharding == "ddp":
            self.learner.settle(next(self.loader.epoch(0)))
        try:
            self.learner.restore(files, checkpoint.optimizer)
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(
                f"the checkpoint of step {checkpoint.step} does not fit: other towers, words or "
                f"optimizer ({str(error).splitlines()[0]}); train without --resume"
            ) from error
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        if mine or self._same_order(checkpoint):
            self.records = checkpoint.records
            self.reported = len(self.records)
        else:  # the epoch that was begun is begun again, with the batches there are now
            self.step = self.epoch * self.order.steps
        if elsewhere:  # the best one so far lies elsewhere
            self.best = {"step": 0, "epoch": 0}
            if self.over:
                raise InputError(f"{given} ends epoch {self.epoch} already; give more --epochs")

    def _same_order(self, checkpoint) -> bool:
        """Whether the checkpoint's training saw the same batches."""
        then = checkpoint.settings["train"]
        names = ("batch_size", "lanes", "pairs", "neighbours", "seed")
        same = all(then[name] == getattr(self.settings, name) for name in names)
        return same and checkpoint.data_version == self.piece.inputs["data"]

    def _check_storage(self) -> None:
        """Every worker must read in the run folder what another one wrote there."""
        folder = store.join(self.folder, "probes")
        mine, other = (
            store.join(folder, str((self.world.rank + shift) % self.world.size)) for shift in (0, 1)
        )
        problem = ""
        try:
            store.write_bytes(mine, self.piece.fingerprint.encode())
        except OSError as error:
            problem = f"cannot write in {self.root}: {error}"
        self.world.barrier()
        try:
            seen = problem or store.read_bytes(other).decode() == self.piece.fingerprint
            problem = problem or ("" if seen else f"reads an old {other}")
        except OSError:
            problem = f"cannot read {other}, which another worker wrote"
        problems = self.world.gather_messages(problem)
        if self.world.rank == 0:
            store.remove(folder)
        if problems:
            raise InputError(
                f"{problems[0]}; --root must be storage that every node reads and writes (a shared "
                "folder or an object store)"
            )

    def publish(self) -> None:
        """Put the selected checkpoint's weights where the later stages look for them."""
        if self.world.rank == 0:
            chosen = store.join(self.checkpoints, checkpoint_files.name_of(self.best["step"]))
            found = checkpoint_files.read(chosen)
            if found is None:
                raise InputError(f"{chosen} is torn; delete it and train again")
            checkpoint, _ = found
            model = store.read_bytes(store.join(chosen, "model.safetensors"))
            words = (json.dumps(self.vocabulary.state) + "\n").encode()
            outputs = {"model.safetensors": model, "vocabulary.json": words}
            for name, data in outputs.items():
                store.write_bytes(store.join(self.folder, name), data)
            ends = [record for record in self.records if "epoch" in record]
            summary = {
                "epoch": checkpoint.epoch,
                "torn_checkpoints": self.torn,
                "collapsed": [r["epoch"] for r in ends if r.get("train/collapsed")],
                "metrics": checkpoint.metrics,
                "parameters": sum(p.numel() for p in self.learner.model.parameters()),
                "features": self.train_split.features,
                "architecture": self.architecture,
                "recipe": self.recipe.model_dump(mode="json"),
                "files": {
                    name: {"bytes": len(data), "sha256": store.sha256(data)}
                    for name, data in outputs.items()
                },
            }
            history = {"summary": summary, "records": self.records}
            store.write_json(self.piece.output, {"fingerprint": self.piece.fingerprint, **history})
        self.world.barrier()


def _split_if_any(root: str, split: str, **read) -> Split | None:
    index = run_folder.need_index(run_folder.folder(root, "shard"), "shard")
    some = any(entry["samples"] for entry in run_folder.of_split(index, split))
    return Split(root, split, **read) if some else None


def _embeddings(recipe: Recipe, root: str, split: str) -> tuple[Captions | None, str | None]:
    """The vectors of a split's captions and their version, if they are needed."""
    if not needs_embeddings(recipe.train):
        return None, None
    every = embed.files(recipe, root).of_split(split)
    files = Files.of(every.folder, [entry for entry in every.entries if entry["captions"]])
    return Captions.read(files), files.version


def _near(captions: Captions | None, group: int) -> np.ndarray | None:
    """(M, K) image rows whose captions are nearest to those of each image, the nearest first."""
    if group == 1:
        return None
    image_N = torch.from_numpy(captions.image_of)
    of = {"query_group": image_N, "candidate_group": image_N}
    of |= {"query_owner": image_N, "candidate_owner": image_N}
    return nearest.top_k(captions.vectors, None, SPARE * group, **of)[1].numpy()
