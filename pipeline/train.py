"""Stage 5: a two-tower model is trained on the shards.

`fit` knows torch.distributed and nothing of what started it: it runs bare, under torchrun and
under Ray Train alike.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load

from pipeline import _checkpoint, _plan, _store, embed, models
from pipeline._batches import Batch, Loader, Order, Split
from pipeline._errors import InputError
from pipeline._objective import Objective, check, needs_relevance
from pipeline._plan import Piece, Plan
from pipeline._world import World
from pipeline.formulas.metrics import recall_at
from pipeline.label import Captions
from pipeline.models import TwoTower, Vocabulary
from schemas.settings import Recipe

Report = Callable[[list[dict]], None]  # takes the records of an epoch, from every worker


def plan(recipe: Recipe, root: str, name: str) -> Plan:
    """One piece: the model. It depends on embeddings and labels only if a loss is graded."""
    check(recipe.train)
    shards = _plan.need_index(_plan.folder(root, "shard"), "shard")
    folder = _plan.folder(root, "train", name)
    used = [entry["files"] for s in ("train", "val") for entry in _plan.of_split(shards, s)]
    settings = {"model": recipe.model.model_dump(), "train": recipe.train.model_dump()}
    if needs_relevance(recipe.train):
        embeddings = _plan.need_index(embed.folder_of(recipe, root), "embed")
        used += [entry["files"] for entry in _plan.of_split(embeddings, "train")]
        settings["label"] = recipe.label.model_dump(exclude={"top_k"})
    # Another number of workers, threads or restarts is the same training.
    relevant = {
        **settings,
        "train": recipe.train.model_dump(
            exclude={"workers", "decode_threads", "timeout", "max_failures", "log_every"}
        ),
    }
    piece = Piece(
        name="model",
        output=_store.join(folder, "history.json"),
        fingerprint=_store.fingerprint("train", relevant, used),
        inputs={"recipe": recipe, "root": root, "name": name, "data": shards["version"]},
    )
    return _plan.plan("train", folder, [piece], settings)


def summary(piece: Piece) -> dict:
    """What the finished training left in its folder."""
    history = _store.read_json(piece.output)
    data = _store.read_bytes(piece.output)
    own = {"history.json": {"bytes": len(data), "sha256": _store.sha256(data)}}
    return {**history["summary"], "files": {**history["summary"]["files"], **own}}


def load_model(folder: str) -> tuple[TwoTower, Vocabulary, Recipe]:
    """The trained model of a folder of stage 5, in evaluation mode on the GPU if there is one."""
    index = _plan.need_index(folder, "train")
    words = _store.read_json(_store.join(folder, "vocabulary.json"))
    vocabulary = Vocabulary(words)
    recipe = Recipe(**index["pieces"][0]["recipe"])
    features = index["pieces"][0]["features"]
    model = models.build(recipe.model, vocabulary=vocabulary, features=features)
    model.load_state_dict(load(_store.read_bytes(_store.join(folder, "model.safetensors"))))
    return model.eval().to(World().device), vocabulary, recipe


def best_val(root: str, name: str) -> float:
    """The model's rSum on val; -1 where there is no such model or no val split."""
    index = _plan.read_index(_plan.folder(root, "train", name))
    return index["pieces"][0]["metrics"].get("val/rsum", -1.0) if index else -1.0


def fit(piece: Piece, report: Report) -> None:
    """Train to the end from the newest checkpoint; `report` gets every epoch's records.

    Every worker calls this and reports equally often. Worker 0 writes.
    """
    training = Training(piece, World())
    while training.epoch < training.settings.epochs:
        report(training.run_epoch())
    training.publish()


@dataclass
class Training:
    """A training in progress: what it is made of, and how far it is."""

    piece: Piece
    world: World
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    best: dict = field(default_factory=lambda: {"epoch": 0, "val/rsum": -1.0})
    records: list[dict] = field(default_factory=list)  # by step, all of them

    def __post_init__(self):
        self.recipe: Recipe = self.piece.inputs["recipe"]
        self.settings = self.recipe.train
        root, recipe = self.piece.inputs["root"], self.recipe
        torch.manual_seed(self.settings.seed)
        size = recipe.model.image_size
        self.train_split = Split(root, "train", image_size=size)
        self.val_split = _split_if_any(root, "val", size)
        self.vocabulary = Vocabulary.of(
            self.train_split.captions, min_count=recipe.model.min_word_count
        )
        self.order = Order(
            self.train_split,
            batch_size=self.settings.batch_size,
            lanes=self.settings.lanes,
            pairs=self.settings.pairs,
            seed=self.settings.seed,
        )
        self.loader = Loader(
            self.order,
            self.vocabulary,
            rank=self.world.rank,
            size=self.world.size,
            max_words=recipe.model.max_words,
            threads=self.settings.decode_threads,
        )
        captions, self.label_version = _embeddings(recipe, root)
        self.objective = Objective(
            self.settings, recipe.label, self.train_split, captions, self.world
        )
        try:
            self.model = models.build(
                recipe.model, vocabulary=self.vocabulary, features=self.train_split.features
            ).to(self.world.device)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.optimizer = _optimizer(self.model, self.settings)
        self._resume()
        self.parallel = self.model
        if self.world.together:
            self.parallel = torch.nn.parallel.DistributedDataParallel(self.model)

    @property
    def checkpoints(self) -> str:
        return _store.join(self.piece.output.rsplit("/", 1)[0], "checkpoints")

    def run_epoch(self) -> list[dict]:
        """Train one epoch, validate, write a checkpoint; the epoch's records."""
        started, waited, records = time.perf_counter(), 0.0, []
        self.parallel.train()
        for batch in self.loader.epoch(self.epoch):
            waited += batch.waited
            record = self._step(batch)
            if self.step % self.settings.log_every == 0:
                records.append(record())
        seconds = time.perf_counter() - started
        self.epoch += 1
        summary = {
            "step": self.step,
            "epoch": self.epoch,
            "train/samples_per_second": self.order.steps * self.settings.batch_size / seconds,
            "train/data_wait": waited / seconds,
            **self._validate(),
        }
        records.append(summary)
        self.records += records
        if summary.get("val/rsum", 0.0) > self.best["val/rsum"] or self.settings.select == "last":
            self.best = {"epoch": self.epoch, "val/rsum": summary.get("val/rsum", 0.0)}
        self._write_checkpoint(summary)
        return records

    def _step(self, batch: Batch) -> Callable[[], dict]:
        """One optimizer step; a function that reads its record (reading waits for the device)."""
        batch = batch.to(self.world.device)
        lr = self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        amp = self.settings.precision == "amp_bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=amp):
            images, texts = self.parallel(batch.images, batch.words, batch.lengths)
        epoch = self.step / self.order.steps
        loss, terms = self.objective(images.float(), texts.float(), batch, epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.clip_grad_norm, error_if_nonfinite=False
        )
        if not math.isfinite(float(norm)):
            raise InputError(
                f"the gradient is not finite at step {self.step} (loss {float(loss.detach()):g}); "
                "lower --train.lr or use --train.precision fp32"
            )
        self.optimizer.step()
        self.step += 1
        step = self.step

        def record() -> dict:
            values = {"train/loss": loss, **{f"train/{k}": v for k, v in terms.items()}}
            means = {name: float(self.world.mean(v.detach())) for name, v in values.items()}
            return {"step": step, "train/lr": lr, "train/grad_norm": float(norm), **means}

        return record

    def _lr(self) -> float:
        done = self.step / (self.order.steps * self.settings.epochs)
        factor = {
            "constant": 1.0,
            "step": 1.0 if done < 2 / 3 else 0.1,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }[self.settings.lr_schedule]
        return self.settings.lr * factor

    def _validate(self) -> dict[str, float]:
        """Recalls on val, the work shared by the workers; nothing where there is no val split."""
        if self.val_split is None:
            return {}
        self.parallel.eval()
        images, texts, owners = encode_split(
            self.model,
            self.vocabulary,
            self.val_split,
            self.world,
            max_words=self.recipe.model.max_words,
        )
        positive_MN = torch.arange(len(images))[:, None] == owners[None, :]
        scores_MN = (images @ texts.T).cpu()
        metrics = {}
        for direction in ("i2t", "t2i"):
            s, p = scores_MN, positive_MN
            if direction == "t2i":
                s, p = s.T, p.T
            for k in (1, 5, 10):
                metrics[f"val/{direction}_R_at_{k}"] = 100 * float(recall_at(s, p, k).mean())
        return {**metrics, "val/rsum": sum(metrics.values())}

    def _write_checkpoint(self, metrics: dict) -> None:
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
            }
            name = _checkpoint.name_of_epoch(self.epoch)
            _store.write_json(_store.join(self.checkpoints, "records.json"), self.records)
            _checkpoint.write(
                self.checkpoints, name, about, self.model, self.optimizer, self.vocabulary.words
            )
        self.world.barrier()

    def _resume(self) -> None:
        found = _checkpoint.latest(self.checkpoints, self.piece.fingerprint)
        if found is None:
            if self.world.rank == 0:  # what lies here belongs to other settings
                _store.remove(self.checkpoints)
            self.world.barrier()
            return
        checkpoint, _ = found
        _checkpoint.restore(found, self.model, self.optimizer)
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        records = _store.read_json(_store.join(self.checkpoints, "records.json"))
        self.records = [record for record in records if record["step"] <= self.step]

    def publish(self) -> None:
        """Put the selected checkpoint's weights where the later stages look for them."""
        if self.world.rank == 0:
            chosen = _checkpoint.name_of_epoch(self.best["epoch"])
            found = _checkpoint.read(_store.join(self.checkpoints, chosen))
            if found is None:
                raise InputError(f"{self.checkpoints}/{chosen} is torn; delete it and train again")
            checkpoint, files = found
            folder = self.piece.output.rsplit("/", 1)[0]
            words = (json.dumps(self.vocabulary.words) + "\n").encode()
            outputs = {"model.safetensors": files["model.safetensors"], "vocabulary.json": words}
            for name, data in outputs.items():
                _store.write_bytes(_store.join(folder, name), data)
            summary = {
                "epoch": checkpoint.epoch,
                "metrics": checkpoint.metrics,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "features": self.train_split.features,
                "recipe": self.recipe.model_dump(mode="json"),
                "files": {
                    name: {"bytes": len(data), "sha256": _store.sha256(data)}
                    for name, data in outputs.items()
                },
            }
            _store.write_json(
                self.piece.output,
                {
                    "fingerprint": self.piece.fingerprint,
                    "summary": summary,
                    "records": self.records,
                },
            )
        self.world.barrier()


@torch.inference_mode()
def encode_split(
    model: TwoTower,
    vocabulary: Vocabulary,
    split: Split,
    world: World,
    *,
    max_words: int,
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image vectors (M, D), caption vectors (N, D) and each caption's image row (N,)."""

    def share(count: int) -> np.ndarray:
        """This worker's rows; equally many on each, the last repeated where they run out."""
        each = -(-count // world.size)
        return np.minimum(np.arange(world.rank * each, (world.rank + 1) * each), count - 1)

    def together(parts: list[torch.Tensor], count: int) -> torch.Tensor:
        return world.gather(torch.cat(parts))[:count]

    images, texts = [], []
    rows = share(len(split))
    for start in range(0, len(rows), batch_size):
        payload = np.stack([split.image(row) for row in rows[start : start + batch_size]])
        images.append(model.encode_image(torch.from_numpy(payload).to(world.device)))
    rows = share(len(split.captions))
    for start in range(0, len(rows), batch_size):
        captions = [split.captions[row] for row in rows[start : start + batch_size]]
        words, lengths = vocabulary.encode(captions, max_words)
        texts.append(model.encode_text(words.to(world.device), lengths))
    owners = torch.from_numpy(np.repeat(np.arange(len(split)), split.caption_count))
    return together(images, len(split)), together(texts, len(split.captions)), owners


def _split_if_any(root: str, split: str, image_size: int) -> Split | None:
    index = _plan.need_index(_plan.folder(root, "shard"), "shard")
    some = any(entry["samples"] for entry in _plan.of_split(index, split))
    return Split(root, split, image_size=image_size) if some else None


def _embeddings(recipe: Recipe, root: str) -> tuple[Captions | None, str | None]:
    """The train captions' vectors and their version, if a loss needs relevance."""
    if not needs_relevance(recipe.train):
        return None, None
    folder = embed.folder_of(recipe, root)
    entries = _plan.of_split(_plan.need_index(folder, "embed"), "train")
    entries = [entry for entry in entries if entry["captions"]]
    version = _plan.version(entries)
    uris = tuple(_store.join(folder, f"{entry['name']}.parquet") for entry in entries)
    return Captions.read(uris, version), version


def _optimizer(model: torch.nn.Module, settings) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
