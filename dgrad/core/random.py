"""Draws that layers, estimators and networks share."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def seed_for(purpose: str, *numbers: int) -> int:
    """The seed of a generator for one purpose, from the numbers that it depends on: a run's seed, a rank.

    Mixed, not added: torch's generator on a CPU looks at the lower 32 bits of a seed alone.

    >>> seed_for("evaluation", 0) % 2**32 == seed_for("training noise", 0) % 2**32
    False
    """
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1  # torch takes 63 bits


def gumbel(
    like: Float[Tensor, "batch *rest"], samples: int = 1, *, generator: Generator | None = None
) -> Float[Tensor, "samples batch *rest"]:
    """Independent Gumbel(0, 1) noise, `samples` times the shape of `like`.

    It is on the device of `like`, in float32 or wider, and always finite.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    uniform = torch.rand((samples, *like.shape), dtype=dtype, device=like.device, generator=generator)
    # -log(-log U); a draw of exactly 0 would be infinite. `exponential_` takes almost three times as long on a CPU.
    return uniform.clamp_min_(torch.finfo(dtype).tiny).log_().neg_().log_().neg_()


def drop(x: Tensor, rate: float, *, generator: Generator | None = None) -> Tensor:
    """`x` with each number made 0 with probability `rate`, and the others scaled so that the mean stays."""
    if rate == 0:
        return x
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * kept / (1 - rate)
