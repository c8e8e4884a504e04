"""Softmax, argmax and softplus in forms that are fast on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dgrad.core.modes import in_transform
from dgrad.kernels import cpu

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

SLOW_LENGTHS = range(3, 16)
"""Of a last axis over which torch's softmax takes three to five times as long on a CPU as over the first axis."""

BISECTIONS, NEWTON_STEPS = 12, 6
"""With which `entmax` finds its threshold to the last digits."""


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` outside of `torch.autocast`, which would multiply its matrices in half precision."""

    @functools.wraps(function)
    def run(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        device = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*arguments, **keywords)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **keywords)

    return run


def softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """`torch.softmax` over the last axis, fast for few values too.

    >>> import torch
    >>> softmax(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if cpu.serves_rows(x):
        return cpu.softmax(x)
    if x.device.type != "cpu" or x.shape[-1] not in SLOW_LENGTHS:
        return x.softmax(-1)
    return x.reshape(-1, x.shape[-1]).T.contiguous().softmax(0).T.contiguous().view(x.shape)


def log_softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """`torch.log_softmax` over the last axis, fast for few values too.

    >>> import torch
    >>> log_softmax(torch.zeros(1, 4)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if cpu.serves_rows(x):
        return cpu.log_softmax(x)
    if x.device.type != "cpu" or x.shape[-1] not in SLOW_LENGTHS:
        return x.log_softmax(-1)
    return x.reshape(-1, x.shape[-1]).T.contiguous().log_softmax(0).T.contiguous().view(x.shape)


def one_hot(indices: Int[Tensor, "*lead"], values: int, dtype: torch.dtype) -> Shaped[Tensor, "*lead values"]:
    """`F.one_hot` in a dtype. On a CPU that looks at the indices, which `torch.func.vmap` cannot.

    >>> import torch
    >>> one_hot(torch.tensor([1]), 3, torch.float32)
    tensor([[0., 1., 0.]])
    """
    if in_transform():
        return (indices.unsqueeze(-1) == torch.arange(values, device=indices.device)).to(dtype)
    return F.one_hot(indices, values).to(dtype)


def jacobian_product(q: Float[Tensor, "*#lead k"], vectors: Float[Tensor, "*#lead k"]) -> Float[Tensor, "*lead k"]:
    """`J(q) v = q (v - q.v)` for each row, `J(q) = diag(q) - q q^T` the Jacobian of a softmax whose value is q."""
    return q * (vectors - (q * vectors).sum(-1, keepdim=True))


def entmax(x: Float[Tensor, "*lead k"], alpha: float) -> Float[Tensor, "*lead k"]:
    """The alpha-entmax over the last axis: sparsemax for 2, softmax in the limit of 1. Exact zeros in between.

    `p = max(0, (alpha - 1) x - t)^(1 / (alpha - 1))`, with t such that p sums to 1. Derivatives to the third order are
    those of the formula. For alpha above 1.5 the second ones grow without limit where a value is about to become 0.

    Args:
        alpha: above 1, at most 2.

    Reference: Martins & Astudillo 2016, From softmax to sparsemax (arXiv 1602.02068); Peters, Niculae & Martins 2019,
    Sparse sequence-to-sequence models (arXiv 1905.05702).

    >>> import torch
    >>> entmax(torch.tensor([1.0, 0.5, -1.0]), 2.0)
    tensor([0.7500, 0.2500, 0.0000])
    """
    power = 1 / (alpha - 1)
    y = (alpha - 1) * x
    largest = y.detach().amax(-1, keepdim=True)
    y = y - largest

    def excess(t: Tensor, y: Tensor) -> Tensor:
        return (y - t).clamp_min(0).pow(power).sum(-1, keepdim=True) - 1

    with torch.no_grad():
        low, flat = torch.full_like(largest, -1.0), y.detach()  # the sum is 1 or more there
        step = 0.5
        for _ in range(BISECTIONS):
            low = torch.where(excess(low + step, flat) >= 0, low + step, low)
            step /= 2
    # Newton's steps: convex and from the left, they do not overshoot. Two steps with a graph have all derivatives to
    # the third order.
    for count in range(NEWTON_STEPS):
        with torch.set_grad_enabled(torch.is_grad_enabled() and count >= NEWTON_STEPS - 2):
            inside = y > low
            base = torch.where(inside, y - low, 1.0)  # a power of 0 has no second derivative
            slope = power * torch.where(inside, base.pow(power - 1), 0.0).sum(-1, keepdim=True)
            low = low + (torch.where(inside, base.pow(power), 0.0).sum(-1, keepdim=True) - 1) / slope
    inside = y > low
    return torch.where(inside, torch.where(inside, y - low, 1.0).pow(power), 0.0)


def kl_to_uniform(x: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead"]:
    """`KL(softmax(x) || uniform)` summed over the rows, in nats.

    >>> import torch
    >>> kl_to_uniform(torch.zeros(1, 3, 4))
    tensor([0.])
    """
    if cpu.serves_rows(x):
        return cpu.kl_to_uniform(x)
    log_p = log_softmax(x).clamp_min(torch.finfo(x.dtype).min)  # finite where a logit of -inf forbids a value
    # sum_ij p_ij (log p_ij + log k), which is 0 at 0 where the difference of two entropies is a rounding error
    return (log_p.exp() * (log_p + math.log(x.shape[-1]))).sum((-2, -1))


def one_hot_argmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """The argmax over the last axis as one-hot rows, the first of equals.

    >>> import torch
    >>> one_hot_argmax(torch.tensor([1.0, 3.0, 3.0]))
    tensor([0., 1., 0.])
    """
    if cpu.serves_rows(x):
        return cpu.one_hot_argmax(x)
    best = x.argmax(-1, keepdim=True)
    if in_transform():  # vmap has no scatter_ of a number
        return one_hot(best.squeeze(-1), x.shape[-1], x.dtype)
    return torch.zeros_like(x).scatter_(-1, best, 1.0)


def softplus(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log(1 + exp(x))`, to within a unit of the last place of 1 or of the result, whichever is larger.

    On a CPU torch takes a `log1p`, which is ten times as slow as a `log` on some processors.

    >>> import torch
    >>> softplus(torch.tensor([-200.0, 0.0, 200.0]))
    tensor([  0.0000,   0.6931, 200.0000])
    """
    if x.device.type != "cpu" or torch._C._are_functorch_transforms_active():  # torch.func takes no own gradients
        return F.softplus(x)
    result: Tensor = _Softplus.apply(x)
    return result


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # max(x, 0) - log sigmoid(|x|)
        return x.abs().sigmoid_().log_().neg_().add_(x.clamp_min(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid()
