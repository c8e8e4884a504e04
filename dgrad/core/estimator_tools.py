"""The words that estimators are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Objective
from dgrad.errors import InputError


def replace_gradient(
    loss: Float[Tensor, "samples batch"],
    logits: Float[Tensor, "batch *code"],
    direction: Float[Tensor, "samples batch *code"],
) -> Float[Tensor, "samples batch"]:
    """`loss`, unchanged in value and in its other gradients, with `direction` as its gradient for the logits."""
    return add_gradient(loss, (direction.detach() * logits).flatten(2).sum(-1))


def add_gradient(loss: Float[Tensor, "*lead"], surrogate: Float[Tensor, "#*lead"]) -> Float[Tensor, "*lead"]:
    """`loss`, unchanged in value, with the gradient of `surrogate` added: how an estimator trains what it learns."""
    return loss + (surrogate - surrogate.detach())


def loss_and_slope(
    objective: Objective, codes: Float[Tensor, "samples batch *code"]
) -> tuple[Float[Tensor, "samples batch"], Float[Tensor, "samples batch *code"]]:
    """The loss of the codes, with its gradient for the decoder still to come, and its gradient in the codes, without one."""
    leaf = codes.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(leaf)
        (slope,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    return (loss if torch.is_grad_enabled() else loss.detach()), slope


def layer_missing(name: str) -> InputError:
    """The error of an estimator whose learned parts have not been made."""
    return InputError(
        f"{name} learns something of the latent layer's size; expected estimator.set_layer(layer) before the optimizer is made"
    )


def check_choice(name: str, got: Any, choices: tuple[str, ...]) -> str:
    """`got`, if it is one of the choices.

    Raises:
        InputError: it is none of them.
    """
    if got not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {got!r}")
    return str(got)


def check_count(name: str, got: int, *, least: int = 1) -> int:
    """`got`, if it is a whole number of at least `least`.

    Raises:
        InputError: it is not.
    """
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise InputError(f"{name} must be a whole number of at least {least}; got {got!r}")
    return got


def needs_independent_rows(name: str) -> Callable[[LatentLayer], str | None]:
    """The limitation of an estimator that changes one categorical row at a time."""

    def limitation(layer: LatentLayer) -> str | None:
        return (
            None
            if layer.independent_rows
            else f"{name} needs a code of independent categorical rows, such as 20x10; got {layer}"
        )

    return limitation


def needs_changes(name: str) -> Callable[[LatentLayer], str | None]:
    """The limitation of an estimator that changes one variable at a time, whatever the structure."""

    def limitation(layer: LatentLayer) -> str | None:
        return (
            None
            if layer.changes
            else f"{name} changes one variable of a code at a time, as of 20x10 or pairs:15; {layer} does not say how: take rloo"
        )

    return limitation


def needs_binary_rows(name: str) -> Callable[[LatentLayer], str | None]:
    """The limitation of an estimator that is for binary variables."""

    def limitation(layer: LatentLayer) -> str | None:
        if layer.independent_rows and layer.shape[-1] == 2:
            return None
        return f"{name} is for binary variables, such as 20x2; got {layer}: take a latent of two values, or rloo, arsm or leg"

    return limitation


def sweep_evaluations(layer: LatentLayer) -> int:
    """The evaluations of a sweep, the code itself included: `n(k-1) + 1` for categorical rows."""
    return layer.changes + 1
