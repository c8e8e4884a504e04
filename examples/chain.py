"""A chain of variables: `dgrad train --plugin examples/chain.py --latent chain:6x4 --estimator direct-rb`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import wide
from dgrad.core.random import gumbel


@dataclass(frozen=True)
class Chain(dgrad.LogLinear):
    """Chains: `chain:TxK`, T variables of K values, for example chain:6x4. Logits `[T - 1, K, K]` weigh neighbours."""

    length: int
    values: int
    spec, least = "chain:{length}x{values}", 2

    shape = property(lambda self: (self.length - 1, self.values, self.values))
    support_size = property(lambda self: self.values**self.length)
    decoded_shape = property(lambda self: (self.length, self.values))
    moves = property(lambda self: dgrad.Substitutions(self.indices, self.codes, self.length, self.values))

    def decoded(self, codes: Tensor) -> Tensor:
        return torch.cat([codes[..., :1, :, :].sum(-1), codes.sum(-2)], -2)  # one-hot rows [..., T, K]

    def indices(self, codes: Tensor) -> Tensor:
        return self.decoded(codes).argmax(-1)

    def codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = F.one_hot(indices, self.values).to(dtype)
        return rows[..., :-1, :, None] * rows[..., 1:, None, :]

    def log_z(self, logits: Tensor) -> Tensor:
        return self._forward(logits, torch.logsumexp)[-1].logsumexp(-1)

    def _forward(self, logits: Tensor, total: Callable[..., Tensor]) -> list[Tensor]:
        """The total over the variables before each one, for each of its values, `[..., K]`."""
        totals = [torch.zeros_like(logits[..., 0, 0, :])]
        for pair in logits.unbind(-3):
            totals.append(total(totals[-1].unsqueeze(-1) + pair, -2))
        return totals

    def _backward(self, logits: Tensor, total: Callable[..., Tensor], pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The code of the values that `pick` takes from scores `[..., K]`, from the last variable to the first."""
        totals = self._forward(logits, total)
        values = [pick(totals[-1])]
        for before, pair in zip(totals[-2::-1], reversed(logits.unbind(-3)), strict=True):
            values.append(pick(before + pair.take_along_dim(values[-1][..., None, None], -1).squeeze(-1)))
        return self.codes(torch.stack(values[::-1], -1), logits.dtype)

    def argmax(self, potentials: Tensor) -> Tensor:  # Viterbi
        return self._backward(potentials, torch.amax, lambda scores: scores.argmax(-1))

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        def draw(scores: Tensor) -> Tensor:
            return (scores + gumbel(scores, generator=generator)[0]).argmax(-1)

        potentials = wide(logits.detach()).expand(samples, *logits.shape)
        return self._backward(potentials, torch.logsumexp, draw).to(logits.dtype)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("chain", Chain.parse)
