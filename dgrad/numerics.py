"""Softmaxes over the values of a variable. May import torch only."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

SLOW_LENGTHS = range(3, 16)
"""Of a last axis over which torch's softmax takes three to five times as long on a CPU as over the first axis."""


def softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """`torch.softmax` over the last axis, fast for few values too.

    >>> import torch
    >>> softmax(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if x.device.type != "cpu" or x.shape[-1] not in SLOW_LENGTHS:
        return x.softmax(-1)
    return x.reshape(-1, x.shape[-1]).T.contiguous().softmax(0).T.contiguous().view(x.shape)


def log_softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """`torch.log_softmax` over the last axis, fast for few values too.

    >>> import torch
    >>> log_softmax(torch.zeros(1, 4)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if x.device.type != "cpu" or x.shape[-1] not in SLOW_LENGTHS:
        return x.log_softmax(-1)
    return x.reshape(-1, x.shape[-1]).T.contiguous().log_softmax(0).T.contiguous().view(x.shape)
