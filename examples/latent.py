"""A latent of independent bits: `dgrad train --plugin examples/latent.py --latent bits:20 --estimator rloo`."""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.distributions import Bernoulli, Distribution, Independent

import dgrad
from dgrad.errors import approx_int

ENUMERABLE = 2**16


@dataclass(frozen=True)
class Bits(dgrad.LatentLayer):
    """`count` independent bits: codes are `[n]`, zeros and ones. The family of nx2, with one logit for a bit."""

    count: int

    @classmethod
    def parse(cls, text: str) -> "Bits":
        """Independent bits: `bits:N`, for example bits:20."""
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
            raise dgrad.InputError(f"cannot read {text!r} as a number of bits; expected for example bits:20")
        return cls(int(text))

    def __str__(self) -> str:
        return f"bits:{self.count}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count,)

    @property
    def support_size(self) -> int:
        return 2**self.count

    @property
    def one_hot_rows(self) -> bool:
        return False  # the bits are independent, but no bit is a one-hot row

    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        # l + log u - log(1 - u) > 0 with probability sigmoid(l): logistic noise, the difference of two Gumbels.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        uniform = torch.rand((samples, *logits.shape), dtype=dtype, device=logits.device, generator=generator)
        return torch.logit(uniform, eps=torch.finfo(dtype).eps)  # eps: always finite

    def argmax(self, potentials: Tensor) -> Tensor:
        return (potentials > 0).to(potentials.dtype)

    def relax(self, potentials: Tensor, temperature: float | Tensor) -> Tensor:
        return torch.sigmoid(potentials / temperature)

    def mean(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def log_prob(self, logits: Tensor, codes: Tensor) -> Tensor:
        # <l, z> - log Z
        return (codes * logits - F.softplus(logits)).sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        return -sum(p.exp() * p for p in (F.logsigmoid(logits), F.logsigmoid(-logits))).sum(-1)

    def kl(self, logits: Tensor) -> Tensor:
        # sum_i p_i (log p_i + log 2) over both values: 0 at 0, where n log 2 - entropy would be a rounding error
        return sum(p.exp() * (p + math.log(2)) for p in (F.logsigmoid(logits), F.logsigmoid(-logits))).sum(-1)

    def linear_sweep(self, weights: Tensor, codes: Tensor) -> Tensor:
        return weights * (1 - 2 * codes)  # a bit that is flipped adds its weight, or takes it away

    def enumerate(self, like: Tensor) -> Tensor:
        if self.support_size > ENUMERABLE:
            raise dgrad.InputError(
                f"latent {self} has {approx_int(self.support_size)} codes, too many to list; "
                f"at most {ENUMERABLE} are: bits:16"
            )
        numbers = torch.arange(self.support_size, device=like.device)
        return self.codes(numbers.unsqueeze(-1) >> torch.arange(self.count, device=like.device) & 1, like.dtype)

    def indices(self, codes: Tensor) -> Tensor:
        return codes.long()

    def codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return indices.to(dtype)

    def distribution(self, logits: Tensor) -> Distribution:
        return Independent(Bernoulli(logits=logits), 1)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("bits", Bits.parse)
