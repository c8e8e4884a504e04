"""Predictions of a loss before it is seen: a moving average, and a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgrad import InputError

DECAY = 0.99


def read_average(average: Tensor, weight: Tensor) -> Tensor:
    """The moving average corrected for its start at 0; 0 before the first loss."""
    return average / weight.clamp_min(1 - DECAY)


@torch.no_grad()
def update_average(average: Tensor, weight: Tensor, loss: Tensor) -> None:
    """Take the mean of `loss` into the moving average, in place: two buffers, which start at 0."""
    if not loss.numel():  # the mean of no loss is not a number
        return
    average.mul_(DECAY).add_((1 - DECAY) * loss.mean())
    weight.mul_(DECAY).add_(1 - DECAY)


class ScalarNetwork(nn.Module):
    """`[*lead, *code] -> [*lead]`: one hidden layer, smooth to second order; 0 until it has learned."""

    def __init__(self, shape: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.code_axes = len(shape)
        self.hidden = nn.Linear(torch.Size(shape).numel(), hidden)
        self.output = nn.Linear(hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, codes: Tensor) -> Tensor:
        flat = codes.flatten(-self.code_axes).to(self.hidden.weight.dtype)
        if flat.shape[-1] != self.hidden.in_features:
            raise InputError(
                f"the learned baseline is for codes of {self.hidden.in_features} numbers; got {flat.shape[-1]}: call "
                "set_layer(dgrad.restricted(layer, mask=mask)) for sequences of one length, or take credit='site'"
            )
        return self.output(nn.functional.silu(self.hidden(flat))).squeeze(-1).to(codes.dtype)
