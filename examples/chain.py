"""A chain of variables: `dgrad train --plugin examples/chain.py --latent chain:6x4 --estimator direct-rb`."""

import re
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
    """`length` variables of `values` values: logits `[T - 1, k, k]` for both values of each pair of neighbours."""

    length: int
    values: int

    @classmethod
    def parse(cls, text: str) -> "Chain":
        """Chains of variables with potentials of neighbours: `chain:TxK`, for example chain:6x4."""
        match = re.fullmatch("([0-9]{1,4})x([0-9]{1,4})", text)
        if not match or min(int(match[1]), int(match[2])) < 2:
            raise dgrad.InputError(f"cannot read {text!r} as TxK, both at least 2; expected for example chain:6x4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"chain:{self.length}x{self.values}"

    shape = property(lambda self: (self.length - 1, self.values, self.values))
    support_size = property(lambda self: self.values**self.length)
    decoded_shape = property(lambda self: (self.length, self.values))
    moves = property(lambda self: Sites(self))

    def decoded(self, codes: Tensor) -> Tensor:
        return torch.cat([codes[..., :1, :, :].sum(-1), codes.sum(-2)], -2)  # one-hot rows [..., T, k]

    def indices(self, codes: Tensor) -> Tensor:
        return self.decoded(codes).argmax(-1)

    def codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = F.one_hot(indices, self.values).to(dtype)
        return rows[..., :-1, :, None] * rows[..., 1:, None, :]

    def log_z(self, logits: Tensor) -> Tensor:
        return self._forward(logits, torch.logsumexp)[-1].logsumexp(-1)

    def _forward(self, logits: Tensor, total: Callable[..., Tensor]) -> list[Tensor]:
        """The total over the variables before each one, for each of its values, `[..., k]`."""
        totals = [torch.zeros_like(logits[..., 0, 0, :])]
        for pair in logits.unbind(-3):
            totals.append(total(totals[-1].unsqueeze(-1) + pair, -2))
        return totals

    def _backward(self, totals: list[Tensor], logits: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The code of the values that `pick` takes from scores `[..., k]`, from the last variable to the first."""
        values = [pick(totals[-1])]
        for before, pair in zip(totals[-2::-1], reversed(logits.unbind(-3)), strict=True):
            row = F.one_hot(values[-1], self.values).to(pair.dtype).unsqueeze(-2)
            values.append(pick(before + (row @ pair.mT).squeeze(-2)))
        return self.codes(torch.stack(values[::-1], -1), logits.dtype)

    def argmax(self, potentials: Tensor) -> Tensor:  # Viterbi
        return self._backward(self._forward(potentials, torch.amax), potentials, lambda scores: scores.argmax(-1))

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        potentials = wide(logits.detach())
        totals = [total.expand(samples, *total.shape) for total in self._forward(potentials, torch.logsumexp)]
        return self._backward(totals, potentials, lambda at: (at + gumbel(at, generator=generator)[0]).argmax(-1)).to(
            logits.dtype
        )


class Sites(dgrad.Moves):
    """One variable takes another value."""

    def __init__(self, layer: Chain) -> None:
        self.layer, self.count = layer, layer.length * (layer.values - 1)

    def neighbours(self, codes: Tensor) -> Tensor:
        length, values = self.layer.decoded_shape
        steps = torch.eye(length, dtype=torch.long, device=codes.device)  # [T, T]
        steps = (steps * torch.arange(1, values, device=codes.device)[:, None, None]).flatten(0, 1)  # [C, T]
        return self.layer.codes((self.layer.indices(codes) + steps[:, None, None]) % values, codes.dtype)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("chain", Chain.parse)
