"""Subsets of k of n: `dgrad train --plugin examples/subset.py --latent subset:3of6 --estimator rloo`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import wide

NEVER = -1e30  # log 0, but finite, as its derivatives are


@dataclass(frozen=True)
class Subset(dgrad.LogLinear):
    """Subsets: `subset:KofN`, K of N items, for example subset:3of6. Codes are `[N]`, 1 for an item that is in."""

    size: int
    items: int
    spec = "subset:{size}of{items}"

    def __post_init__(self) -> None:
        if not 0 < self.size < self.items:
            raise dgrad.InputError(f"{self} is no subset of fewer than all items; expected for example subset:3of6")

    shape = property(lambda self: (self.items,))
    support_size = property(lambda self: math.comb(self.items, self.size))
    moves = property(lambda self: dgrad.Toggles(self.shape))  # N of them; dgrad.Exchanges has K(N - K)

    def log_z(self, logits: Tensor) -> Tensor:
        return self._tables(logits)[-1][0][..., self.size]

    def _tables(self, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of the first 0, 1 ... n items: `log e_j` of all subsets and of those with the last item, `[..., k + 1]`."""
        start = torch.full_like(logits[..., :1], NEVER).expand(*logits.shape[:-1], self.size)
        tables = [(F.pad(start, (1, 0)), start)]
        for logit in logits.split(1, -1):
            # e_j(<= i) = e_j(< i) + exp(l_i) e_(j-1)(< i); the second derivative of logaddexp would be inf/inf
            before = tables[-1][0]
            with_item = F.pad(before[..., :-1] + logit, (1, 0), value=NEVER)
            tables.append((torch.stack([before, with_item]).logsumexp(0), with_item))
        return tables

    def argmax(self, potentials: Tensor) -> Tensor:
        return torch.zeros_like(potentials).scatter(-1, potentials.topk(self.size, -1).indices, 1.0)

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        potentials = wide(logits.detach())
        uniform = torch.rand(samples, *logits.shape, dtype=potentials.dtype, device=logits.device, generator=generator)
        left = torch.full_like(uniform[..., :1], self.size, dtype=torch.long)  # how many items are still to come
        code: list[Tensor] = []
        for (total, with_item), u in zip(self._tables(potentials)[:0:-1], uniform.flip(-1).split(1, -1), strict=True):
            # from the last item to the first: in with chance exp(l_i) e_(j-1)(< i) / e_j(<= i)
            log_chance = (with_item - total).expand(*left.shape[:-1], -1).gather(-1, left)
            code.append((1 - u).log() <= log_chance)
            left = left - code[-1].long()
        return torch.cat(code[::-1], -1).to(logits.dtype)


@dgrad.hookimpl
def dgrad_register_latents(register):
    register("subset", Subset.parse)
