"""Draws that layers and estimators share. May import torch only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def gumbel(
    like: Float[Tensor, "batch *rest"], samples: int = 1, *, generator: Generator | None = None
) -> Float[Tensor, "samples batch *rest"]:
    """Independent Gumbel(0, 1) noise, `samples` times the shape of `like`, on its device, in float32 or wider; always finite."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    uniform = torch.rand((samples, *like.shape), dtype=dtype, device=like.device, generator=generator)
    # -log(-log U); a draw of exactly 0 would be an infinite potential. (`exponential_` takes almost three times as long on a CPU.)
    return uniform.clamp_min_(torch.finfo(dtype).tiny).log_().neg_().log_().neg_()
