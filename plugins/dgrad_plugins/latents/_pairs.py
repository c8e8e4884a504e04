"""The pairwise latent layer: n bits with a potential for each and for every pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad import InputError, LogLinear, Moves, Substitutions
from dgrad.core.latent_layer import check_batch, wide
from dgrad.core.random import gumbel

MOST_BITS = 16
"""Every one of their 65,536 settings is weighed for each example: 256 KiB of float32."""
SETTINGS_AT_ONCE = 2**20
"""On a CPU, of some examples together: what is as large as that stays in the caches, and its memory is used again."""


@dataclass(frozen=True)
class Pairs(LogLinear):
    """Bits with a potential for each and for every pair: `pairs:N`, for example pairs:15.

    `<l, z> = sum_i l_i b_i + sum_(i<j) l_ij b_i b_j`. A code is `[n + n(n-1)/2]`: the bits, then their products in the
    order (0,1), (0,2) ... (n-2,n-1). A decoder sees the bits alone. MAP, log Z, marginals and draws are exact, by
    weighing all settings: those of one half of the bits against those of the other, in a few matrix products for a
    whole batch. The authors of Lorberbom et al. 2019 solve the MAP an image at a time, with CPLEX, or with max-flow
    where all `l_ij >= 0`.

    `noise` is that of the paper: logistic noise on the bits and none on the pairs. With potentials of pairs
    `argmax(l + noise)` is perturb-and-MAP, no draw of `q`. `sample` draws from `q` itself.

    >>> import torch
    >>> layer = Pairs(3)
    >>> str(layer), layer.shape, layer.support_size
    ('pairs:3', (6,), 8)
    >>> layer.argmax(torch.tensor([-1.0, -1.0, -1.0, 3.0, 0.0, 0.0]))
    tensor([1., 1., 0., 1., 0., 0.])
    """

    bits: int
    spec = "pairs:{bits}"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise InputError(
                f"latent {self} has {self.bits} bits; expected 1 to {MOST_BITS}, of which every setting is weighed, "
                "for example pairs:15"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.bits + math.comb(self.bits, 2),)

    @property
    def support_size(self) -> int:
        return 2**self.bits

    @property
    def moves(self) -> Moves:
        return BitFlips(self)

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        return (self.bits,)

    def decoded(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*inputs"]:
        return codes[..., : self.bits]

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        uniform = torch.rand(
            (samples, *logits.shape[:-1], self.bits), dtype=dtype, device=logits.device, generator=generator
        )
        # logistic: the difference of the Gumbels of a bit's two values
        return F.pad(torch.logit(uniform, eps=torch.finfo(dtype).eps), (0, math.comb(self.bits, 2)))

    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        best = self._in_parts(lambda part: self._weights(part).flatten(-2).argmax(-1), potentials)
        return self._code_of(best, potentials.dtype)

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self._in_parts(self._mean, logits)

    def _mean(self, logits: Tensor) -> Tensor:
        first, second = self._half_settings(logits)  # [A, a], [B, b]
        weights = self._weights(logits)  # [..., A, B]
        q = weights.flatten(-2).softmax(-1).view_as(weights)
        of_first, of_second = q.sum(-1), q.sum(-2)  # [..., A], [..., B]
        # E[b_i b_j], in blocks of both halves
        between = first.T @ q @ second  # [..., a, b]
        moments = torch.cat(
            [
                torch.cat([(first.T * of_first.unsqueeze(-2)) @ first, between], -1),
                torch.cat([between.mT, (second.T * of_second.unsqueeze(-2)) @ second], -1),
            ],
            -2,
        )  # [..., n, n]
        i, j = self._pairs(logits.device)
        return torch.cat([moments.diagonal(dim1=-2, dim2=-1), moments[..., i, j]], -1).to(logits.dtype)

    def log_z(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*batch"]:
        return self._in_parts(lambda part: _logsumexp(self._weights(part).flatten(-2)), logits).to(logits.dtype)

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        return -self._in_parts(lambda part: self._mean_log_q(part, 0.0), logits).to(logits.dtype)

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        # sum_z q (log q + n log 2), which is 0 at 0 where the difference of two entropies is a rounding error
        return self._in_parts(lambda part: self._mean_log_q(part, self.bits * math.log(2)), logits).to(logits.dtype)

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        return self._code_of(torch.arange(self.support_size, device=like.device), like.dtype)

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        return codes[..., : self.bits].long()

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        return self.with_products(indices.to(dtype))

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Draws of `q` itself: the first half of the bits from its marginal, then the second given the first."""
        number = self._in_parts(lambda part: self._draw(part, samples, generator).movedim(0, -1), logits.detach())
        return self._code_of(number.movedim(-1, 0), logits.dtype)  # [S, B, code]

    def _draw(self, logits: Tensor, samples: int, generator: Generator | None) -> Tensor:
        """The numbers of settings drawn, `[S, B]`."""
        weights = self._weights(logits)  # [B, A, C]
        of_first = _logsumexp(weights)  # [B, A]
        first = (of_first + gumbel(of_first, samples, generator=generator)).argmax(-1)  # [S, B]
        given_first = weights[torch.arange(len(weights), device=weights.device), first]  # [S, B, C]
        second = (given_first + gumbel(given_first, generator=generator).squeeze(0)).argmax(-1)  # [S, B]
        return first * weights.shape[-1] + second

    # All settings: rows for those of the first half of the bits, columns for those of the second

    def _in_parts(self, evaluate: Callable[[Tensor], Tensor], potentials: Tensor) -> Tensor:
        """`evaluate`, `[..., code] -> [..., *any]`, of potentials; on a CPU of some at a time."""
        at_once = max(1, SETTINGS_AT_ONCE >> self.bits)
        if potentials.device.type != "cpu" or torch.compiler.is_compiling() or potentials.shape[:-1].numel() <= at_once:
            return evaluate(potentials)
        parts = potentials.flatten(0, -2).split(at_once)
        return torch.cat([evaluate(part) for part in parts]).unflatten(0, potentials.shape[:-1])

    def _weights(self, potentials: Tensor) -> Tensor:
        """`<l, z>` of every setting, `[..., A, B]`, in float32 or wider."""
        potentials = wide(potentials)
        first, second = self._half_settings(potentials)  # [A, a], [B, b]
        alone, matrix, half = potentials[..., : self.bits], self._matrix(potentials), first.shape[-1]
        of_first = alone[..., :half] @ first.T + ((first @ matrix[..., :half, :half]) * first).sum(-1)  # [..., A]
        of_second = alone[..., half:] @ second.T + ((second @ matrix[..., half:, half:]) * second).sum(-1)  # [..., B]
        # between the halves, and the sums of both, in one product: [first L, of_first, 1] [second, 1, of_second]'
        ones_first, ones_second = torch.ones_like(of_first), torch.ones_like(of_second)
        left = torch.cat([first @ matrix[..., :half, half:], torch.stack([of_first, ones_first], -1)], -1)
        right = torch.cat(
            [second.expand(*of_second.shape, -1), torch.stack([ones_second, of_second], -1)], -1
        )  # [..., B, b + 2]
        return left @ right.mT

    def _mean_log_q(self, logits: Tensor, constant: float) -> Tensor:
        """`E_q[log q + constant]`, in float32 or wider."""
        weights = self._weights(logits).flatten(-2)  # [..., 2^n]
        return torch.linalg.vecdot(weights.softmax(-1), weights.log_softmax(-1) + constant)

    def _half_settings(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        first = self.bits // 2
        return _settings(first, dtype, like.device), _settings(self.bits - first, dtype, like.device)

    def _pairs(self, device: torch.device) -> Tensor:
        return torch.triu_indices(self.bits, self.bits, 1, device=device)

    def _matrix(self, potentials: Tensor) -> Tensor:
        """The potentials of pairs `[..., n, n]`, above the diagonal."""
        i, j = self._pairs(potentials.device)
        matrix = potentials.new_zeros(*potentials.shape[:-1], self.bits, self.bits)
        matrix[..., i, j] = potentials[..., self.bits :]
        return matrix

    def with_products(self, bits: Tensor) -> Tensor:
        """The code of some bits."""
        i, j = self._pairs(bits.device)
        return torch.cat([bits, bits[..., i] * bits[..., j]], -1)

    def _code_of(self, number: Tensor, dtype: torch.dtype) -> Tensor:
        """The code of a setting by its number, whose first bit is the greatest."""
        return self.with_products(_bits_of(number, self.bits).to(dtype))


def _logsumexp(weights: Tensor) -> Tensor:
    """Over the last axis, by a softmax.

    Most exponentials underflow here. On some processors torch's `exp` is then ten times as slow as its softmax.
    """
    return weights[..., 0] - weights.log_softmax(-1)[..., 0]


def _settings(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All settings of some bits, `[2^bits, bits]`."""
    return _bits_of(torch.arange(2**bits, device=device), bits).to(dtype)


def _bits_of(number: Tensor, bits: int) -> Tensor:
    place = 2 ** torch.arange(bits - 1, -1, -1, device=number.device)
    return number.unsqueeze(-1).div(place, rounding_mode="floor") % 2  # ONNX has no shift


class BitFlips(Substitutions):
    """A code is changed by flipping one of its bits, which takes the products along."""

    def __init__(self, layer: Pairs) -> None:
        super().__init__(layer.indices, layer.codes, variables=layer.bits, values=2)

    def potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        # what a bit that is 1 loses by becoming 0 is what it gains by being 1
        return F.pad((1 - 2 * codes[..., : self.count]) * changes.movedim(0, -1), (0, math.comb(self.count, 2)))
