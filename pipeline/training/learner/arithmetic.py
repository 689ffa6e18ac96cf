"""In which numbers the towers compute. Losses, weights and sums over workers are float32 always."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Arithmetic:
    """The arithmetic of `train.precision` on a device."""

    def __init__(self, precision: str, device: torch.device):
        self.dtype = AUTOCAST.get(precision)  # None: float32
        self.device, self.tf32 = device.type, precision == "tf32"

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, towers compute in it."""
        on = self.dtype is not None
        with self.backward(), torch.autocast(self.device, self.dtype, enabled=on):
            yield

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, gradients of towers compute in it (autocast's ops remember their own)."""
        with allowed_tf32(self.tf32) if self.tf32 else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def casts_kept(self) -> Iterator[None]:
        """Inside, a weight is cast to half precision once, and not in every `forward` anew.

        Not around passes with and without a graph: casts made without one send no gradient back.
        """
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


@contextlib.contextmanager
def allowed_tf32(allowed: bool) -> Iterator[None]:
    """Inside, a GPU multiplies float32 in TF32 (10 bits of 23), or does not.

    By the setting that torch has had all along: the newer one by operator (`fp32_precision`, from
    2.9 on) makes torch refuse to be asked for the older one, which its compiler does.
    """
    # Products; convolutions and GRUs.
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was
