"""Gradients that kernels compute themselves: which there are, and what is said of the others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def first_order(backward: Backward) -> Backward:
    """A Function's backward whose gradients may be used for anything but a second derivative.

    With `create_graph=True` they come with a graph in which trying that raises a sentence; torch's
    `once_differentiable` passes them off as constants where the incoming gradient is one.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> Gradients:
        in_graph = torch.is_grad_enabled()
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not in_graph:
            return found
        return tuple(
            None if gradient is None else _FirstOrder.apply(gradient.detach().requires_grad_())
            for gradient in found
        )

    return wrapped


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "the gradient of this loss cannot be differentiated again: its kernels compute the "
            "first derivative alone. Leave it out of what is differentiated, or take a loss in "
            "plain torch and not by way of both_directions: info_nce, siglip, list_net, list_mle, "
            "soft_label_kl"
        )


def refuse_learned(loss: str, settings: Mapping[str, Any], learned: tuple[str, ...]) -> None:
    """Raises where a setting wants a gradient and is not among those that get one."""
    for name, value in settings.items():
        wanted = torch.is_tensor(value) and value.requires_grad and torch.is_grad_enabled()
        if wanted and name not in learned:
            may = f"of its settings only {', '.join(learned)} may be" if learned else "none may be"
            raise ValueError(
                f"{loss} gives {name} no gradient, so it cannot be learned ({may}); give a number, "
                f"or {name}.detach()"
            )


def over_temperature(
    x_QN: Tensor, temperature: float | Tensor, name: str = "temperature"
) -> Tensor:
    """x_QN / temperature, which must be above 0; NaN where a learned one has come to 0 or below.

    A device is not waited for to see whether it has.
    """
    if torch.is_tensor(temperature):
        return x_QN / torch.where(temperature > 0, temperature, torch.nan)
    if not temperature > 0:
        raise ValueError(f"{name} must be above 0, got {temperature}")
    return x_QN / temperature
