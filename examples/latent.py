"""A latent of independent bits: `dgrad train --plugin examples/latent.py --latent bits:20 --estimator rloo`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad


@dataclass(frozen=True)
class Bits(dgrad.LogLinear):
    """Independent bits: `bits:N`, for example bits:20. The family of Nx2, with one logit for a bit."""

    count: int
    spec = "bits:{count}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count,)

    @property
    def support_size(self) -> int:
        return 2**self.count

    @property
    def independent_parts(self) -> bool:
        return True  # argmax(logits + noise) is a draw

    @property
    def moves(self) -> dgrad.Moves:
        return dgrad.Toggles(self.shape)

    def log_z(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sum(-1)  # sum_i log(exp(0) + exp(l_i))

    def argmax(self, potentials: Tensor) -> Tensor:
        return (potentials > 0).to(potentials.dtype)

    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        # l + log u - log(1 - u) > 0 with probability sigmoid(l): logistic noise, the difference of two Gumbels.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        uniform = torch.rand((samples, *logits.shape), dtype=dtype, device=logits.device, generator=generator)
        return torch.logit(uniform, eps=torch.finfo(dtype).eps)  # eps: always finite

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return self.argmax(logits.detach() + self.noise(logits, samples, generator=generator)).to(logits.dtype)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("bits", Bits.parse)
