"""The words that estimators are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_inference_mode, in_transform, needs_transforms
from dgrad.errors import InputError, shown
from dgrad.kernels.numerics import entmax


def replace_gradient(
    loss: Float[Tensor, "samples batch"],
    logits: Float[Tensor, "batch *code"],
    direction: Float[Tensor, "samples batch *code"],
) -> Float[Tensor, "samples batch"]:
    """`loss` with `direction` as its gradient for the logits; its value and its other gradients stay.

    A second derivative raises an InputError, as with `add_gradient`.
    """
    if needs_transforms():
        return add_gradient(loss, (direction.detach() * logits).flatten(2).sum(-1))
    return loss + _Direction.apply(logits, direction.detach())


class _Direction(torch.autograd.Function):
    """0 for each code, with a direction as its gradient for the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, direction: Tensor) -> Tensor:
        ctx.save_for_backward(logits, direction)
        return direction.new_zeros(direction.shape[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, direction = ctx.saved_tensors
        return _once(weighted(direction, gradient).sum(0).to(logits.dtype), logits), None


_constant_directions = 0
"""How many `constant_directions` are open."""


@contextmanager
def constant_directions() -> Iterator[None]:
    """Within it, gradients may be differentiated: the directions of `replace_gradient` count as constants.

    For a control variate that learns from the square of a gradient. An error there costs no bias.
    """
    global _constant_directions
    _constant_directions += 1
    try:
        yield
    finally:
        _constant_directions -= 1


def _once(gradient: Tensor, source: Tensor) -> Tensor:
    """A gradient whose dependence on its source is not in its graph, in a backward pass that makes one."""
    return _Once.apply(gradient, source) if torch.is_grad_enabled() and not _constant_directions else gradient


class _Once(torch.autograd.Function):
    """The gradient. Whoever differentiates it is told that the result would be wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise InputError(
            "the gradient of an estimate was differentiated; expected a first derivative alone, for an estimator's "
            "gradient has none that is right: take exact or gumbel-softmax, or leave the estimate out of what is "
            "differentiated twice"
        )


def vjp(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The value of a function, and what carries a gradient for it back to the argument: `torch.func.vjp` for one.

    Neither has a gradient. In `torch.inference_mode` the second gives zeros.
    """
    if in_inference_mode():
        return function(at), lambda gradient: torch.zeros_like(at)
    if needs_transforms():
        value, carry = torch.func.vjp(function, at.detach())[:2]
        return value, lambda gradient: carry(gradient)[0]
    with torch.enable_grad():
        variable = at.detach().requires_grad_()
        value = function(variable)
    return value.detach(), lambda gradient: torch.autograd.grad(value, variable, gradient)[0]


def leaf(logits: Float[Tensor, "batch *code"]) -> Float[Tensor, "batch *code"]:
    """The logits as a variable of their own, for `slope_of`.

    Raises:
        InputError: `torch.compile` or a transform of `torch.func` calls, which do not allow it.
    """
    if needs_transforms():
        raise InputError(
            "this estimator differentiates a gradient by torch.autograd, which torch.compile and torch.func do not "
            "allow; expected a call outside them: or take rloo"
        )
    return logits.detach().requires_grad_()


def slope_of(
    value: Tensor, leaf: Tensor, weights: Tensor | None = None, *, create_graph: bool = False
) -> Float[Tensor, "..."]:
    """The gradient of `value` for `leaf`; zeros where nothing depends on it, and in `torch.inference_mode`."""
    if in_inference_mode():  # no graph is recorded, and whoever calls has no use for gradients
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(value, leaf, weights, create_graph=create_graph, materialize_grads=True)
    return slope


def add_gradient(loss: Float[Tensor, "*lead"], surrogate: Float[Tensor, "#*lead"]) -> Float[Tensor, "*lead"]:
    """`loss`, unchanged in value, with the gradient of `surrogate` added: how an estimator trains what it learns.

    That gradient cannot be differentiated again: the second derivative of a surrogate is that of nothing else.
    """
    if torch.compiler.is_compiling():  # which refuses second derivatives itself
        return loss + (surrogate - surrogate.detach())
    function = _TransformedSurrogate if in_transform() else _Surrogate
    return loss + function.apply(surrogate)


class _Surrogate(torch.autograd.Function):
    """0, with the gradient of its argument."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor) -> Tensor:
        ctx.save_for_backward(surrogate)
        return torch.zeros_like(surrogate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _once(gradient, *ctx.saved_tensors)


class _TransformedSurrogate(torch.autograd.Function):
    """The same in the form that `torch.func` takes, which costs an ordinary call 70 microseconds."""

    generate_vmap_rule = True
    backward = _Surrogate.backward

    @staticmethod
    def forward(surrogate: Tensor) -> Tensor:
        return torch.zeros_like(surrogate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


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
        ctx.save_for_backward(logits)
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        with torch.no_grad():
            result = ctx.direction(gradient).sum(0)
        return None, _once(result, *ctx.saved_tensors), None


@torch.no_grad()
def perturb_and_map(
    layer: LatentLayer, logits: Float[Tensor, "batch *code"], samples: int, *, generator: Generator | None
) -> tuple[Float[Tensor, "samples batch *code"], Float[Tensor, "samples batch *code"]]:
    """Perturbed logits `phi + G`, and the codes that are their argmax."""
    potentials = logits + layer.noise(logits, samples, generator=generator)
    return potentials, layer.argmax(potentials)


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


def check_alpha(alpha: float) -> float:
    """The alpha of a relaxation, if it is one: see `relaxed`.

    Raises:
        InputError: it is not between 1 and 2.
    """
    expected = "a number from 1 to 2 (1 is softmax, 1.5 entmax, 2 sparsemax)"
    return check_number("alpha", alpha, expected, lambda number: 1 <= number <= 2)


def relaxed(
    layer: LatentLayer, potentials: Float[Tensor, "*lead"], temperature: Tensor, alpha: float
) -> Float[Tensor, "*lead"]:
    """The relaxed argmax of a layer: its own for alpha 1, alpha-entmax of one-hot rows above."""
    if alpha == 1:
        return layer.relax(potentials, temperature)
    return entmax(layer.lowered(potentials) / temperature, alpha)


def needs_relaxation(name: str, alpha: float) -> Callable[[LatentLayer], str | None]:
    """Why an estimator that perturbs logits and relaxes their argmax does not support a layer."""
    perturbed = needs(name, "noise", "relax")

    def why_unsupported(layer: LatentLayer) -> str | None:
        if alpha == 1 or layer.one_hot_rows:
            return perturbed(layer)
        return needs_one_hot_rows(f"{name} with alpha={alpha:g}")(layer)

    return why_unsupported


def check_choice(name: str, got: Any, choices: tuple[str, ...]) -> str:
    """`got`, if it is one of the choices.

    Raises:
        InputError: it is none of them.
    """
    if not isinstance(got, str) or got not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {shown(got)}")
    return got


def check_count(name: str, got: Any, *, least: int = 1) -> int:
    """`got`, if it is a whole number of at least `least`. Integers of numpy are whole numbers too.

    Raises:
        InputError: it is not.
    """
    if isinstance(got, bool) or not isinstance(got, Integral) or int(got) < least:
        remedy = ": for one code an example take reinforce or relax" if name == "samples" and shown(got) == "1" else ""
        raise InputError(f"{name} must be a whole number of at least {least}; got {shown(got)}{remedy}")
    return int(got)


def check_number(name: str, got: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """`got`, if it is a number that fits. Numbers of numpy are numbers too.

    Raises:
        InputError: it is not.
    """
    if isinstance(got, bool) or not isinstance(got, Real) or not fits(float(got)):
        raise InputError(f"{name} must be {expected}; got {shown(got)}")
    return float(got)


def check_flag(name: str, got: Any) -> bool:
    """`got`, if it is true or false.

    Raises:
        InputError: it is not.
    """
    if not isinstance(got, bool):
        raise InputError(f"{name} must be True or False; got {shown(got)}")
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
