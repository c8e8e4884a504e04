"""Hard codes times a table of vectors, by lookup."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.core.modes import in_transform
from dgrad.errors import InputError


def lookup(codes: Float[Tensor, "*lead n k"], table: Float[Tensor, "values width"]) -> Float[Tensor, "*lead n width"]:
    """`codes @ table` for one-hot rows, by lookup: the first layer of a decoder with one table for all positions.

    The value costs no product, and neither does the gradient of the table. The gradient of the codes is one product.
    It is computed where the codes have a gradient, as those of `estimator.codes` do.

    Args:
        codes: one-hot rows. Relaxed codes would be taken for their largest value: multiply those by the table.
        table: a vector for each value.

    Raises:
        InputError: the table has another number of rows than the codes have values.

    >>> import torch
    >>> lookup(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([[4., 5., 6.]])
    """
    if codes.shape[-1] != len(table):
        raise InputError(
            f"a table of {len(table)} vectors for codes of {codes.shape[-1]} values; expected a vector for each value"
        )
    if in_transform():
        return codes @ table
    indices = codes.detach().argmax(-1)
    if not (torch.is_grad_enabled() and codes.requires_grad):
        return F.embedding(indices, table)
    result: Tensor = _Lookup.apply(codes, table, indices)
    return result


class _Lookup(torch.autograd.Function):
    """`codes @ table`, with the gradients of that product."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, table: Tensor, indices: Int[Tensor, "*lead n"]) -> Tensor:
        ctx.save_for_backward(codes, table, indices)
        return F.embedding(indices, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, table, indices = ctx.saved_tensors
        for_codes = gradient @ table.mT if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_codes, None, None
        if torch.is_grad_enabled():  # a second derivative needs the codes in the graph
            return for_codes, codes.flatten(0, -2).mT @ gradient.flatten(0, -2), None
        for_table = torch.zeros_like(table).index_add_(0, indices.flatten(), gradient.flatten(0, -2))
        return for_codes, for_table, None
