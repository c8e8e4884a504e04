"""The words that estimators are written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import InputError


def replace_gradient(
    loss: Float[Tensor, "samples batch"],
    logits: Float[Tensor, "batch *code"],
    direction: Float[Tensor, "samples batch *code"],
) -> Float[Tensor, "samples batch"]:
    """`loss` with `direction` as its gradient for the logits; its value and its other gradients stay."""
    return add_gradient(loss, (direction.detach() * logits).flatten(2).sum(-1))


def add_gradient(loss: Float[Tensor, "*lead"], surrogate: Float[Tensor, "#*lead"]) -> Float[Tensor, "*lead"]:
    """`loss`, unchanged in value, with the gradient of `surrogate` added: how an estimator trains what it learns."""
    return loss + (surrogate - surrogate.detach())


def carry_back(
    codes: Float[Tensor, "samples batch *code"],
    logits: Float[Tensor, "batch *code"],
    direction: Callable[[Tensor], Tensor],
) -> Float[Tensor, "samples batch *code"]:
    """`codes` with a gradient for the logits: `direction` of the gradient that arrives at the codes, `[S, B, *code]`.

    It cannot be differentiated twice.
    """
    carried: Tensor = _CarryBack.apply(codes, logits, direction)
    return carried


class _CarryBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, logits: Tensor, direction: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.direction = direction
        return codes.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.direction(gradient).sum(0), None


def weighted(
    vectors: Float[Tensor, "samples batch *code"], weights: Float[Tensor, "samples batch"]
) -> Float[Tensor, "samples batch *code"]:
    """Each code's vector times the weight of that code."""
    return weights.reshape(weights.shape + (1,) * (vectors.ndim - 2)) * vectors


def layer_missing(name: str) -> InputError:
    """The error of an estimator whose learned parts have not been made."""
    return InputError(
        f"{name} learns something of the latent layer's size; "
        "expected estimator.set_layer(layer) before the optimizer is made"
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
        remedy = ": for one code an example take reinforce or relax" if name == "samples" and got == 1 else ""
        raise InputError(f"{name} must be a whole number of at least {least}; got {got!r}{remedy}")
    return got


def needs(name: str, *members: str) -> Callable[[LatentLayer], str | None]:
    """Why an estimator that uses members which layers may leave out, such as `noise`, does not support a layer."""

    def why_unsupported(layer: LatentLayer) -> str | None:
        for member in members:
            if not layer.defines(member):
                return f"{name} needs the {member} of a latent, and {layer} defines none: take rloo"
        return None

    return why_unsupported


def needs_all(*reasons: Callable[[LatentLayer], str | None]) -> Callable[[LatentLayer], str | None]:
    """The first of these reasons why an estimator does not support a layer."""
    return lambda layer: next((why for reason in reasons if (why := reason(layer)) is not None), None)


def needs_one_hot_rows(name: str) -> Callable[[LatentLayer], str | None]:
    """Why an estimator that changes one categorical row at a time does not support a layer."""

    def why_unsupported(layer: LatentLayer) -> str | None:
        if layer.one_hot_rows:
            return None
        return f"{name} needs a code of independent categorical rows, such as 20x10; got {layer}"

    return why_unsupported


def needs_moves(name: str) -> Callable[[LatentLayer], str | None]:
    """Why an estimator that changes one variable at a time, whatever the structure, does not support a layer."""

    def why_unsupported(layer: LatentLayer) -> str | None:
        if layer.one_hot_rows or layer.moves is not None:
            return None
        return (
            f"{name} changes one variable of a code at a time, as of 20x10 or pairs:15; "
            f"{layer} does not say how: take rloo"
        )

    return why_unsupported


def needs_binary_rows(name: str) -> Callable[[LatentLayer], str | None]:
    """Why an estimator for binary variables does not support a layer."""

    def why_unsupported(layer: LatentLayer) -> str | None:
        if layer.one_hot_rows and layer.shape[-1] == 2:
            return None
        return (
            f"{name} is for binary variables, such as 20x2; got {layer}: "
            "take a latent of two values, or rloo, arsm or leg"
        )

    return why_unsupported


def sweep_evaluations(layer: LatentLayer) -> int:
    """The evaluations of a sweep, the code itself included: `n(k-1) + 1` for categorical rows."""
    if layer.one_hot_rows:
        return layer.shape[0] * (layer.shape[1] - 1) + 1
    return 1 if layer.moves is None else layer.moves.count + 1
