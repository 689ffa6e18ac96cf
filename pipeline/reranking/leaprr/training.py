"""LeaPRR in training: pairs of an image and a caption, both sub-models, checkpoints as they go.

Lists are made as they will be made when queries are re-ranked: the images of the training data are
cut into galleries, and what is not in a gallery is the bank. Every worker takes its share of each
batch; order and draws are a function of the seed, the epoch and the step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pipeline.errors import InputError
from pipeline.reranking import fitting
from pipeline.reranking.leaprr import losses
from pipeline.reranking.leaprr.model import CandidateLists, LeaPRR, candidate_lists
from pipeline.reranking.problem import SIDES, Problem, View
from pipeline.retrieval.scores import other
from pipeline.storage import store
from pipeline.training.checkpoint import latest, name_of, write
from pipeline.training.distributed import ProcessGroup
from schemas.settings import LeaPRRSettings

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FEWEST = 32  # images of a last gallery that is still worth having


def galleries(problem: Problem, images: int, seed: int) -> list[Problem]:
    """The problem's images dealt into galleries of so many, each with the others as its bank.

    Where the problem has a bank of its own, that stays the bank of all.
    """
    own = problem.gallery["image"]
    generator = torch.Generator().manual_seed(seed)
    order = own[torch.randperm(len(own), generator=generator)]
    parts = [part for part in order.split(images) if len(part) >= min(FEWEST, len(own))]
    if problem.pool == "inductive" and not len(problem.bank["image"]) and len(parts) < 2:
        parts = list(order.chunk(2))  # one for the gallery, the other for the bank
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


@dataclass
class TrainingPairs:
    """Image queries and caption queries of one image, with the views they are asked in."""

    problems: list[Problem]
    steps: list[dict]  # of the chain before LeaPRR
    views: list[dict[str, list[View]]] = field(init=False)

    def __post_init__(self):
        of = fitting.views
        self.views = [{d: of(p, d, self.steps) for d in SIDES} for p in self.problems]

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


class LeaPRRTrainer:
    """Epochs over pairs, from the newest checkpoint on."""

    def __init__(self, piece, report: Callable, train: Problem, val: Problem | None):
        self.piece, self.report, self.world = piece, report, ProcessGroup()
        self.settings: LeaPRRSettings = piece.inputs["leaprr"]
        steps, s = piece.inputs["steps"], self.settings
        self.pairs = TrainingPairs(galleries(train, s.gallery, s.seed), steps)
        self.val, self.steps = val, [*steps, {"method": "leaprr"}]
        torch.manual_seed(s.seed)
        self.model = LeaPRR(s).to(self.world.device)
        self.parallel = self.world.share(self.model, "ddp")
        self.optimizer = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=s.lr, weight_decay=s.weight_decay),
            "sgd": lambda p: torch.optim.SGD(p, s.lr, 0.9, weight_decay=s.weight_decay),
        }[s.optimizer](self.model.parameters())
        self.per_epoch = max(1, len(self.pairs.epoch(0, s.batch_size)))
        self.epoch = self.step = 0
        self.best = {"step": 0, "epoch": 0, "val/rsum": -1.0}
        self.records: list[dict] = []
        self._resume()

    @property
    def checkpoints(self) -> str:
        return store.join(self.piece.output.rsplit("/", 1)[0], "checkpoints")

    def run_epoch(self) -> None:
        """Train one epoch, validate, write a checkpoint, report."""
        s, started, total, seen = self.settings, time.perf_counter(), 0.0, 0
        self.model.train()
        for batch in self.pairs.epoch(s.seed * 100_003 + self.epoch, s.batch_size):
            schedule = torch.pi * self.step / (self.per_epoch * s.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = s.lr * (1 + torch.cos(torch.tensor(schedule)).item()) / 2
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss(batch)
            loss.backward()
            self.optimizer.step()
            total, seen = total + float(loss.detach()), seen + len(batch.images_B)
            self.step += 1
        self.epoch += 1
        record = {
            "step": self.step,
            "epoch": self.epoch,
            "train/loss": float(self.world.mean(torch.tensor(total / self.per_epoch))),
            "train/samples_per_second": seen / (time.perf_counter() - started),
            "train/data_wait": 0.0,
            **self._validated(),
        }
        if not torch.isfinite(torch.tensor(record["train/loss"])):
            raise InputError(
                f"LeaPRR's loss is not finite after epoch {self.epoch}; lower --leaprr.lr"
            )
        self.records.append(record)
        value = record.get("val/rsum", -1.0)
        if value > self.best["val/rsum"] or self.val is None:
            self.best = {"step": self.step, "epoch": self.epoch, "val/rsum": value}
        self._write_checkpoint(record)

    def _loss(self, batch: PairBatch) -> torch.Tensor:
        """Mean over the batch's pairs of both directions' losses: this worker's part of it."""
        share, s = slice(self.world.rank, None, self.world.size), self.settings
        rows = {"i2t": batch.images_B[share], "t2i": batch.captions_B[share]}
        if not len(rows["i2t"]):  # a last batch of fewer pairs than workers
            return sum(p.sum() for p in self.parallel.parameters()) * 0
        asked = {d: self._asked(batch.views[d], rows[d]) for d in SIDES}
        lists_ = [(d, some) for d, (some, _) in asked.items()]
        if s.alignment:
            lists_ += [self._aligned(batch.views, asked, d) for d in SIDES]
        refined = self.parallel(lists_)
        total = 0
        for (some, positive_BK), refined_BK in zip(asked.values(), refined, strict=False):
            total = total + losses.refinement(refined_BK, some.score_BK, positive_BK, s).sum()
        for mine_BK, theirs_BK in zip(refined, refined[2:], strict=False):
            aligned_B = losses.alignment(mine_BK, theirs_BK, s.temperature)
            total = total + s.alignment * aligned_B.sum()
        # DDP takes the mean over workers, whose shares may differ by a pair.
        return total * self.world.size / len(batch.images_B)

    @torch.no_grad()
    def _asked(self, view: View, rows_B) -> tuple[CandidateLists, torch.Tensor]:
        some = candidate_lists(view, rows_B, self.model.shape(view.direction))
        return some, view.positives(rows_B).gather(1, some.place_BK)

    @torch.no_grad()
    def _aligned(
        self, views: dict[str, View], asked: dict, direction: str
    ) -> tuple[str, CandidateLists]:
        """The other direction's queries, with the partners of this one's candidates.

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
        return back, candidate_lists(there, rows_B, self.model.shape(back), place_BK=place_BK)

    @torch.no_grad()
    def _validated(self) -> dict[str, float]:
        if self.val is None:
            return {}
        self.model.eval()
        sums = [fitting.recalls(fitting.views(self.val, d, self.steps, self.model)) for d in SIDES]
        named = dict(zip(("val/i2t", "val/t2i"), sums, strict=True))
        return {**named, "val/rsum": sum(sums)}

    def _write_checkpoint(self, record: dict) -> None:
        if self.world.rank == 0:
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
            state = optimizer.get("state", {})
            tensors = {f"{n}/{k}": v for n, kept in state.items() for k, v in kept.items()}
            about = {
                "fingerprint": self.piece.fingerprint,
                "epoch": self.epoch,
                "step": self.step,
                "metrics": record,
                "best": self.best,
                "settings": self.settings.model_dump(mode="json"),
                "data_version": self.piece.inputs["version"],
                "label_version": None,
                "optimizer": {"param_groups": optimizer["param_groups"]},
            }
            files = {"model": get_model_state_dict(self.model, options=WHOLE), "optimizer": tensors}
            store.write_json(store.join(self.checkpoints, "records.json"), self.records)
            write(self.checkpoints, about, files, [])
        self.world.barrier()
        self.report([record])

    def _resume(self) -> None:
        found, _ = latest(self.checkpoints)
        if found is None or found[0].fingerprint != self.piece.fingerprint:
            if self.world.rank == 0:
                store.remove(self.checkpoints)
            self.world.barrier()
            return
        checkpoint, files = found
        set_model_state_dict(self.model, files["model"], options=WHOLE)
        state: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in files["optimizer"].items():
            name, _, slot = key.rpartition("/")
            state.setdefault(name, {})[slot] = value
        whole = {"state": state, "param_groups": checkpoint.optimizer["param_groups"]}
        set_optimizer_state_dict(self.model, self.optimizer, whole, options=WHOLE)
        self.epoch, self.step, self.best = checkpoint.epoch, checkpoint.step, checkpoint.best
        records = store.read_json(store.join(self.checkpoints, "records.json"))
        self.records = [record for record in records if record["step"] <= self.step]

    def publish(self) -> None:
        """Put the best checkpoint's weights and the history where the later pieces look."""
        if self.world.rank == 0:
            name = name_of(self.best["step"])
            uri = store.join(self.checkpoints, name, "model.safetensors")
            weights = store.read_bytes(uri)
            folder = self.piece.output.rsplit("/", 1)[0]
            store.write_bytes(store.join(folder, "model.safetensors"), weights)
            files = {"model.safetensors": len(weights)}
            summary = {
                "epoch": self.best["epoch"],
                "metrics": {k: v for k, v in self.best.items() if k == "val/rsum" and v >= 0},
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "leaprr": self.settings.model_dump(mode="json"),
                "steps": self.steps,
                "files": {
                    name: {"bytes": size, "sha256": store.sha256(weights)}
                    for name, size in files.items()
                },
            }
            history = {"summary": summary, "records": self.records}
            store.write_json(self.piece.output, {"fingerprint": self.piece.fingerprint, **history})
        self.world.barrier()
