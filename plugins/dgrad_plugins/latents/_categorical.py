"""The categorical latent layer: n independent variables of k values."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, OneHotCategorical

from dgrad.core.latent_layer import LogLinear, check_batch
from dgrad.core.random import gumbel
from dgrad.errors import InputError, approx_int
from dgrad.kernels.numerics import full_precision, kl_to_uniform, log_softmax, one_hot, one_hot_argmax, softmax

LARGEST_CODE = 2**24
"""The most coordinates that a code may have; their logits alone take 64 MiB for each example."""
ENUMERABLE = 2**16
"""The largest support that is listed in full."""


@dataclass(frozen=True)
class Categorical(LogLinear):
    """`variables` independent categorical variables of `values` values each: codes are one-hot rows, `[n, k]`.

    >>> import torch
    >>> layer = Categorical(20, 10)
    >>> str(layer), layer.shape
    ('20x10', (20, 10))
    >>> round(float(layer.kl(torch.zeros(1, 20, 10))), 6)
    0.0
    """

    variables: int
    values: int

    def __post_init__(self) -> None:
        if self.variables * self.values > LARGEST_CODE:
            raise InputError(
                f"latent {self} has {self.variables * self.values:,} coordinates; at most {LARGEST_CODE:,} are possible"
            )
        if self.variables < 1 or self.values < 2:
            raise InputError(
                f"a categorical latent needs at least 1 variable and 2 values; got {self}, expected for example 20x10"
            )

    @classmethod
    def parse(cls, spec: str) -> Categorical:
        """Independent categorical variables: `NxK`, N variables of K values, for example 20x10.

        Raises:
            InputError: the text is not `NxK`, or a number in it is too small.
        """
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", spec)
        if match is None:
            raise InputError(
                f"cannot read {spec!r} as a categorical latent; expected VARIABLESxVALUES, for example 20x10"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.variables}x{self.values}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.variables, self.values)

    @property
    def support_size(self) -> int:
        return self.values**self.variables

    @property
    def one_hot_rows(self) -> bool:
        return True

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        return gumbel(logits, samples, generator=generator)

    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return one_hot_argmax(potentials)

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        return softmax(potentials / temperature)

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        logits = logits.detach()
        return self.argmax(logits + self.noise(logits, samples, generator=generator)).to(logits.dtype)

    def log_z(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*batch"]:
        return logits.logsumexp(-1).sum(-1)

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return softmax(logits)

    @full_precision
    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        log_q = _log_q(logits)
        # The same codes for all examples need nothing of the size of [S, B, n, k].
        shared = codes.shape[1] == 1
        total = codes.flatten(1) @ log_q.flatten(1).mT if shared else (codes * log_q).sum((-2, -1))
        # The other rows only lower a sum with the lowest number in it.
        return torch.where(total <= torch.finfo(total.dtype).min, -torch.inf, total)

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        log_p = _log_q(logits)
        return -(log_p.exp() * log_p).sum((-2, -1))

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        return kl_to_uniform(logits)

    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        return weights - (weights * codes).sum(-1, keepdim=True)

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        if self.support_size > ENUMERABLE:
            raise InputError(
                f"latent {self} has {approx_int(self.support_size)} codes, too many to list; "
                f"at most {ENUMERABLE} are, for example 4x10"
            )
        values = torch.arange(self.values, device=like.device)
        return self.codes(torch.cartesian_prod(*[values] * self.variables).view(-1, self.variables), like.dtype)

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        return codes.argmax(-1)

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        return one_hot(indices, self.values, dtype)

    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        return Independent(OneHotCategorical(logits=logits), 1)


def _log_q(logits: Tensor) -> Tensor:
    """`log q` of every value, a finite number where a logit of -inf forbids it: 0 times it is 0."""
    return log_softmax(logits).clamp_min(torch.finfo(logits.dtype).min)
