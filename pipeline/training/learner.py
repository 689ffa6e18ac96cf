"""One optimizer step on the list of the global batch, encoded whole or in chunks.

A step depends on the weights, the optimizer's state, the batch and the step's number alone: what a
tower draws (dropout) comes from a seed of the step, so a step that is taken again is the same.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InputError
from pipeline.models import TwoTower
from pipeline.training import checkpoint
from pipeline.training.data import Batch
from pipeline.training.distributed import ProcessGroup
from pipeline.training.objective import Objective
from schemas.settings import TrainSettings

AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class NotFinite(Exception):
    """The loss or its gradient was not finite; `batch` is this worker's share, to replay it."""

    def __init__(self, step: int, loss: float, batch: Batch):
        super().__init__(
            f"the gradient is not finite at step {step} (loss {loss:g}); "
            "lower --train.lr or use --train.precision fp32"
        )
        self.step, self.batch = step, batch


class Learner:
    """The towers, what they minimise, and their optimizer."""

    def __init__(
        self,
        model: TwoTower,
        objective: Objective,
        settings: TrainSettings,
        world: ProcessGroup,
        steps_per_epoch: int,
    ):
        self.model, self.objective, self.settings, self.world = model, objective, settings, world
        self.steps_per_epoch = steps_per_epoch
        for name, module in model.named_modules() if settings.chunk else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                raise InputError(
                    f"train.chunk encodes a batch in parts, and {name} normalises over the whole "
                    "of it; set train.chunk 0 or choose a tower without batch norm"
                )
        if settings.compile:
            model.image.compile()
            model.text.compile()
        self.parallel = world.share(model.to(world.device), settings.sharding)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(model, settings)
        fp16 = settings.precision == "amp_fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=fp16)
        self.averages = [p.detach().clone() for p in self.parameters] if settings.ema else []
        self._last: tuple | None = None  # step, batch, loss and norm that were not looked at yet

    def step(self, batch: Batch, number: int) -> Callable[[], dict[str, float]]:
        """Take step `number`; a function that reads its record (reading waits for the device)."""
        batch = batch.to(self.world.device)
        lr = self.settings.lr * lr_factor(self.settings, number, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms, vectors = self._backward(batch, number)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad_norm)
        self.check()
        self._last = (number, batch, loss.detach(), norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averages:
            newest = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.averages, newest, 1 - self.settings.ema)

        def record() -> dict[str, float]:
            values = {"train/loss": loss, **{f"train/{k}": v for k, v in terms.items()}}
            for side, x in zip(("images", "texts"), vectors, strict=True):
                values[f"train/mean_cosine_{side}"] = x.detach().mean(0).square().sum()
            means = {name: float(self.world.mean(v.detach())) for name, v in values.items()}
            return {"train/lr": lr, "train/grad_norm": float(_whole(norm)), **means}

        return record

    def settle(self, batch: Batch) -> None:
        """Do what a first step does once; to be followed by `restore`.

        DDP sums gradients by buckets, which it orders anew after its first backward pass, and a sum
        over workers is rounded by its place: without this, going on would not be bit-equal.
        """
        self._backward(batch.to(self.world.device), 0)
        self.optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """Raises if the step before was not finite: looking a step late never holds up a device.

        With fp16 a gradient beyond its range is normal, and the scaler leaves that step out.
        """
        if self._last is None:
            return
        number, batch, loss, norm = self._last
        self._last = None
        known = loss if self.scaler.is_enabled() else _whole(norm)
        if not math.isfinite(float(known)):
            raise NotFinite(number, float(loss), batch)

    def _backward(self, batch: Batch, number: int):
        """Gradients of one step; the loss, its terms and this worker's vectors."""
        epoch = number / self.steps_per_epoch
        chunk = self.settings.chunk
        if not chunk or chunk >= len(batch):
            vectors = self._encode(batch, number, 0)
            loss, terms = self.objective(*vectors, batch, epoch)
            self.scaler.scale(loss).backward()
            return loss, terms, vectors
        # Gradient caching: all vectors first, without a graph; the loss's gradient with respect to
        # them; then each chunk once more, with a graph that the gradient is sent back through.
        chunks = batch.split(chunk)
        with torch.no_grad():
            parts = [self._encode(part, number, k) for k, part in enumerate(chunks)]
        images, texts = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
        loss, terms = self.objective(images, texts, batch, epoch)
        self.scaler.scale(loss).backward()
        ddp = self.parallel if isinstance(self.parallel, DistributedDataParallel) else None
        grads = zip(images.grad.split(chunk), texts.grad.split(chunk), strict=True)
        for k, (part, grad) in enumerate(zip(chunks, grads, strict=True)):
            # Gradients are exchanged once a step, with its last chunk.
            waits = ddp is not None and k < len(chunks) - 1
            with ddp.no_sync() if waits else contextlib.nullcontext():
                torch.autograd.backward(self._encode(part, number, k), grad)
        return loss, terms, (images, texts)

    def _encode(self, batch: Batch, number: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (n, D) float32 of images and texts."""
        seed = np.random.SeedSequence([self.settings.seed, number, self.world.rank, chunk])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        dtype = AUTOCAST.get(self.settings.precision)
        with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            images, texts = self.parallel(batch.images, batch.words, batch.lengths)
        return images.float(), texts.float()

    @contextlib.contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """The model in evaluation mode, with the averaged weights where there are any."""
        self.parallel.eval()
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self.parallel.train()

    @torch.no_grad()
    def _swap(self) -> None:
        """Averaged weights, where there are any, and those that are trained change places."""
        for parameter, average in zip(self.parameters, self.averages, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> tuple[checkpoint.Tensors, dict]:
        """What a checkpoint keeps: tensors by file, and the rest. Every worker calls it.

        `model` is what is evaluated; with averaged weights, `raw` is what is trained.
        """
        files, rest = checkpoint.state_of(self.model, self.optimizer)
        if self.averages:
            files["raw"] = files["model"]
            with self.as_evaluated():
                averaged = checkpoint.weights_of(self.model)
                files["model"] = {name: value.clone() for name, value in averaged.items()}
        return files, {**rest, "scaler": self.scaler.state_dict()}

    def restore(self, files: checkpoint.Tensors, rest: dict) -> None:
        """Put back what `state` kept. Every worker calls it."""
        if self.averages:
            checkpoint.put_weights(self.model, files["model"])
            self.averages = [p.detach().clone() for p in self.parameters]
            files = {**files, "model": files.get("raw", files["model"])}
        checkpoint.put_state(self.model, self.optimizer, files, rest)
        self.scaler.load_state_dict(rest["scaler"])


def lr_factor(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied with at a step: a linear rise, then the schedule."""
    rise = settings.lr_warmup * steps_per_epoch
    if step < rise:
        return (step + 1) / math.ceil(rise)
    done = (step - rise) / max(1, steps_per_epoch * settings.epochs - rise)
    return {
        "constant": 1.0,
        "step": 1.0 if done < 2 / 3 else 0.1,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[settings.lr_schedule]


def _optimizer(model: TwoTower, settings: TrainSettings) -> torch.optim.Optimizer:
    """Parameters grouped by their share of the learning rate and by whether they decay."""
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (model.lr_scale(name), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    arguments = []
    for (scale, decays), parameters in groups.items():
        decay = settings.weight_decay if decays else 0.0
        arguments.append({"params": parameters, "lr_scale": scale, "weight_decay": decay})
    if settings.optimizer == "sgd":
        return torch.optim.SGD(arguments, lr=settings.lr, momentum=settings.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(arguments, lr=settings.lr)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all shares of the weights."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
