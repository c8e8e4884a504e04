"""Binary variables as rows of two: what the estimators for them share.

The bit of a row is its second coordinate. Its log-odds are `phi = logits[..., 1] - logits[..., 0]`. A gradient `g` for
phi is `[-g, +g]` for the row.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def log_odds(logits: Tensor) -> Tensor:
    """`phi` `[..., n]` of logits `[..., n, 2]`, without gradient."""
    return (logits[..., 1] - logits[..., 0]).detach()


def binary_codes(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot rows `[..., n, 2]` of boolean bits `[..., n]`."""
    return torch.stack([~bits, bits], -1).to(dtype)


def binary_direction(gradient: Tensor) -> Tensor:
    """The gradient for the logits `[..., n, 2]` of one for phi `[..., n]`."""
    return torch.stack([-gradient, gradient], -1)


def antithetic_bits(phi: Tensor, pairs: int = 1, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Pairs of samples of `q`, each from one uniform number for each variable: as different as can be.

    Args:
        phi: log-odds `[B, n]`.
        pairs: S, how many independent pairs.

    Returns:
        the uniform numbers u `[S, B, n]`, and the bits `1{u > sig(-phi)}` of all pairs, then `1{u < sig(phi)}`: boolean
        `[2 S, B, n]`.
    """
    uniform = torch.rand((pairs, *phi.shape), dtype=phi.dtype, device=phi.device, generator=generator)
    # A draw may be exactly 0, never 1: with these signs a probability of 0 or 1 is kept.
    return uniform, torch.cat([uniform >= torch.sigmoid(-phi), uniform < torch.sigmoid(phi)])
