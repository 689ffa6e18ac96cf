"""One optimizer step on the list of the global batch, encoded whole or in chunks.

A step depends on the weights, the optimizer's state, the batch and the step's number alone: what a
tower draws (dropout) comes from a seed of the step, so a step that is taken again is the same.
Nothing in a step waits for the device: what is told of it is read later, or never.
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
from pipeline.training.learner.arithmetic import Arithmetic
from pipeline.training.learner.compiling import compile_towers
from pipeline.training.learner.optimizer import lr_factor, optimizer_of
from pipeline.training.learner.sharding import gathered_no_more, shard
from pipeline.training.objective import Objective
from schemas.settings import TrainSettings


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
        still = {id(module) for tuned in model.tuned.values() for module in tuned.still}
        for name, module in model.named_modules() if settings.chunk else ():
            norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            if norm and id(module) not in still:
                raise InputError(
                    f"train.chunk encodes a batch in parts, and {name} normalises over the whole "
                    "of it; set train.chunk 0, freeze its moments (model.tune_image "
                    "frozen_batch_norm) or choose a tower without batch norm"
                )
        self.base = checkpoint.identity(checkpoint.frozen(model))  # of what is not trained
        self.arithmetic = Arithmetic(settings.precision, world.device)
        self.not_compiled = compile_towers(
            model, settings, world, steps_per_epoch * settings.epochs
        )
        self.sharded = world.together and settings.sharding == "fsdp"
        self.parallel = self._shared(model.to(world.device))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in trained], [p for _, p in trained]
        if not self.parameters:
            raise InputError(
                "nothing is trained: both towers are frozen and no loss learns a temperature; "
                "choose another mode for one of model.tune_image and model.tune_text"
            )
        self.learned = [*model.learned.values()]  # single numbers, alike on all workers
        numbers = {id(p) for p in self.learned}
        self.weights = [p for p in self.parameters if id(p) not in numbers]  # of the towers
        self.optimizer = optimizer_of(model, settings)
        fp16 = settings.precision == "amp_fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=fp16)
        self.averages = [p.detach().clone() for p in self.parameters] if settings.ema else []
        self._last: tuple | None = None  # step, batch, loss and norm that were not looked at yet

    def _shared(self, model: TwoTower) -> torch.nn.Module:
        """The model as it is called in training."""
        if self.sharded:
            shard(model, self.world.device, self.arithmetic.dtype)
            return model
        if self.world.device.type == "cuda" and _convolves(model.image):
            model.image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not any(p.requires_grad for p in (*model.image.parameters(), *model.text.parameters())):
            return model  # nothing in it is to be exchanged
        # What the losses learn is none of its calls': `_backward` exchanges it.
        numbers = [name for name, _ in model.named_parameters() if name.startswith("learned.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, numbers)
        return self.world.share(model)

    def step(self, batch: Batch, number: int) -> Callable[[], dict[str, float]]:
        """Take step `number`; a function that reads its record (reading waits for the device)."""
        batch = batch.to(self.world.device)
        lr = self.settings.lr * lr_factor(self.settings, number, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms, vectors = self._backward(batch, number)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip_grad_norm)
        self.check()
        self._last = (number, batch, loss.detach(), norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.learned:
            self.objective.learned.clamp_(self.objective.parameters)
        if self.averages:
            self._average()

        def record() -> dict[str, float]:
            values = {"train/loss": loss, **{f"train/{k}": v for k, v in terms.items()}}
            for side, x in zip(("images", "texts"), vectors, strict=True):
                values[f"train/mean_cosine_{side}"] = x.detach().mean(0).square().sum()
            means = self.world.mean(torch.stack([v.detach() for v in values.values()])).tolist()
            own = {"train/lr": lr, "train/grad_norm": float(_whole(norm))}
            return {**own, **dict(zip(values, means, strict=True))}

        return record

    def _average(self) -> None:
        """Averaged weights go some of the way to the newest ones."""
        shares: dict[bool, tuple[list, list]] = {True: ([], []), False: ([], [])}
        for average, newest in zip(self.averages, self.parameters, strict=True):
            averages, news = shares[hasattr(average, "full_tensor")]  # no operator takes both
            averages.append(average)
            news.append(newest.detach())
        for averages, news in shares.values():
            if averages:
                torch._foreach_lerp_(averages, news, 1 - self.settings.ema)

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
        """Gradients of one step; the loss, its terms and this worker's vectors.

        The loss's gradient with respect to the vectors comes first, and is then sent back through
        the towers, whose arithmetic is not the loss's. In chunks (gradient caching) all vectors
        are made without a graph, and each chunk once more with one that its gradient goes through.
        """
        chunks = batch.split(self.settings.chunk or len(batch))
        cached = len(chunks) > 1
        with self.arithmetic.casts_kept(), torch.no_grad() if cached else contextlib.nullcontext():
            made = [self._encode(part, number, k) for k, part in enumerate(chunks)]
        images, texts = (
            torch.cat([x.detach() for x in side]).requires_grad_()
            for side in zip(*made, strict=True)
        )
        loss, terms = self.objective(images, texts, batch, number / self.steps_per_epoch)
        self.scaler.scale(loss).backward()
        self._exchange_learned()
        size = len(chunks[0])
        grads = list(zip(images.grad.split(size), texts.grad.split(size), strict=True))
        ddp = self.parallel if isinstance(self.parallel, DistributedDataParallel) else None
        with self.arithmetic.casts_kept():
            for k, (part, grad) in enumerate(zip(chunks, grads, strict=True)):
                # Gradients are exchanged once a step, with its last chunk; FSDP's with each, as
                # they would fill a worker's memory.
                waits = ddp is not None and k < len(chunks) - 1
                with ddp.no_sync() if waits else contextlib.nullcontext():
                    vectors = self._encode(part, number, k) if cached else made[0]
                    trained = [
                        (x, g) for x, g in zip(vectors, grad, strict=True) if x.requires_grad
                    ]
                    with self.arithmetic.backward():
                        if trained:  # of a frozen tower there is nothing to send back
                            outputs, of = zip(*trained, strict=True)
                            torch.autograd.backward(outputs, of)
        return loss, terms, (images, texts)

    def _exchange_learned(self) -> None:
        """The gradient of what the losses learn is that of the global batch: the workers' mean.

        Each has that of its own lists' loss, once a step, in however many chunks it encodes.
        """
        if not self.learned:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned]
        for parameter, grad in zip(self.learned, self.world.mean(torch.stack(own)), strict=True):
            parameter.grad = grad.clone()

    def _encode(self, batch: Batch, number: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (n, D) float32 of images and texts."""
        seed = np.random.SeedSequence([self.settings.seed, number, self.world.rank, chunk])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        with self.arithmetic.forward():
            images, texts = self.parallel(batch.images, batch.words, batch.lengths)
        return images.float(), texts.float()

    @contextlib.contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """The model in evaluation mode, with the averaged weights where there are any."""
        self.parallel.eval()
        self._swap()
        # Blocks that are gathered in bf16 compute in it; others are evaluated in float32.
        half = self.sharded and self.arithmetic.dtype == torch.bfloat16
        try:
            with self.arithmetic.forward() if half else contextlib.nullcontext():
                yield
        finally:
            gathered_no_more(self.model)
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

        They are the very tensors that training changes: `checkpoint.whole` copies them. `model` is
        what is evaluated; with averaged weights, `raw` is what is trained.
        """
        files, rest = checkpoint.state_of(self.model, self.optimizer)
        if self.averages:
            averaged = dict(zip(self.names, self.averages, strict=True))
            files = {**files, "raw": files["model"], "model": {**files["model"], **averaged}}
        return files, {**rest, "scaler": self.scaler.state_dict()}

    def restore(self, files: checkpoint.Tensors, rest: dict, base: str | None = None) -> None:
        """Put back what `state` kept; `base` is the identity of what it did not. Every worker.

        Raises `InputError` where the weights that are not among the files are others than then.
        """
        frozen = checkpoint.frozen(self.model)
        left_out = {k: v for k, v in frozen.items() if k not in files["model"]}
        if left_out and checkpoint.identity(left_out) != base:
            raise InputError(
                f"the checkpoint was made with other weights of the {len(left_out)} tensors that "
                f"are not trained ({next(iter(left_out))}, …): the pretrained model has changed, "
                "or what of it is trained (model.tune_image, model.tune_text, model.freeze, "
                "model.lora_rank); give that model, or train without --resume"
            )
        if self.averages:
            checkpoint.put_weights(self.model, files["model"])
            self.averages = [p.detach().clone() for p in self.parameters]
            files = {**files, "model": files.get("raw", files["model"])}
        checkpoint.put_state(self.model, self.optimizer, files, rest)
        if len(left_out) < len(frozen):  # they came with the checkpoint
            self.base = checkpoint.identity(checkpoint.frozen(self.model))
        self.scaler.load_state_dict(rest["scaler"])


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all shares of the weights."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _convolves(tower: torch.nn.Module) -> bool:
    """Whether a tower is a convolutional one, and not one convolution that cuts out patches."""
    return sum(isinstance(m, torch.nn.Conv2d) for m in tower.modules()) > 1
