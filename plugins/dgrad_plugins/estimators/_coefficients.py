"""Coefficients of control variates, fitted on earlier steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgrad.kernels.numerics import full_precision

DECAY = 0.99
RIDGE = 1e-3
"""Relative to each variate's own mean square; keeps the solution finite where variates are proportional."""


class Coefficients(nn.Module):
    """The `a` that minimises `E |g + sum_r a_r c_r|^2` over the steps so far.

    g is an estimate, and c are variates of mean zero. This is a linear regression on moving averages of products (decay
    0.99). The averages are buffers: they travel in the state dict. An estimate stays unbiased if it reads the
    coefficients before it teaches them its own draw.
    """

    products: Tensor

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.start = start
        # E [c_r . c_s] in the first columns, E [c_r . g] in the last
        self.register_buffer("products", torch.zeros(len(start), len(start) + 1))

    @torch.no_grad()
    def current(self) -> list[Tensor]:
        """The coefficients, 0-d; as they were set at the start where nothing has been learned yet."""
        count = len(self.start)
        # The floor is the root of the smallest mean square there is: no coefficient overflows what it multiplies.
        scale = self.products.diagonal().sqrt().clamp_min(torch.finfo(self.products.dtype).tiny ** 0.5)
        system = self.products / scale.unsqueeze(-1)  # in units in which every variate's mean square is 1
        system = torch.cat([system[:, :-1] / scale, -system[:, -1:]], -1)
        identity = torch.eye(count, dtype=system.dtype, device=system.device)
        system[:, :-1] += RIDGE * identity
        # Gauss-Jordan elimination; no pivots, for the matrix is positive definite, and so nothing waits for the device.
        for i in range(count):
            system = system - (system[:, i] - identity[i]).unsqueeze(-1) * (system[i] / system[i, i])
        fitted = system[:, -1] / scale
        learned = self.products.diagonal().sum() > 0
        return [torch.where(learned, fitted[i], start) for i, start in enumerate(self.start)]

    @torch.no_grad()
    @full_precision
    def learn(self, estimate: Tensor, variates: list[Tensor]) -> None:
        """Take a step's estimate and variates `[B, ...]` into the averages."""
        stacked = torch.stack(
            [*(variate.to(self.products.dtype) for variate in variates), estimate.to(self.products.dtype)]
        )
        flat = stacked.flatten(1)  # [R + 1, B * size]
        self.products.mul_(DECAY).add_((1 - DECAY) / len(estimate) * (flat[:-1] @ flat.T))
