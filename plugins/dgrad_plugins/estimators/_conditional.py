"""Perturbed logits given the code that won: what several estimators draw a second time."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad.core.random import gumbel


def conditional_potentials(
    log_p: Tensor, codes: Tensor, samples: int = 1, *, generator: Generator | None = None
) -> Tensor:
    """Draws of `log p + G` given that its argmax is `codes`, for categorical rows; differentiable in `log p`.

    Args:
        log_p: normalised logits `[B, n, k]`.
        codes: one-hot rows `[S, B, n, k]`.

    Returns:
        `[samples, S, B, n, k]`.

    Source: Maddison, Tarlow & Minka 2014; Tucker et al. 2017, appendix.
    """
    return given_code(log_p, codes, gumbel(codes, samples, generator=generator))


def given_code(log_p: Tensor, codes: Tensor, noise: Tensor) -> Tensor:
    """The same, from Gumbel noise `[samples, S, B, n, k]`, which is -log E with E ~ Exp(1)."""
    top = (noise * codes).sum(-1, keepdim=True)  # the maximum of the row: -log E_z, because sum_j p_j = 1
    # The others are Gumbel with location log p_j, truncated at the maximum: -log(E_j / p_j + E_z)
    others = -torch.logaddexp(-noise - log_p, -top)
    return torch.where(codes.bool(), top, others)
