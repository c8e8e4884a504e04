"""The contract of a latent layer: a family of distributions over discrete codes. May import torch; no estimator, no model.

The axis contract of the whole project stands here, once. A *code* has the shape of the logits of one example (`layer.shape`,
for categorical variables `n x k` one-hot rows, categories last). In front of it stand the batch `B` and, where codes are
sampled, the samples `S`:

    logits  [B, *shape]        one distribution for each example
    codes   [S, B, *shape]     samples, hard: zeros and ones, in the logits' dtype
    losses  [S, B]             one number for each code
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.distributions import Distribution


class LatentLayer(ABC):
    """A family of distributions over codes that is log-linear in the code: `log q(z) = <logits, z> - log Z`.

    A layer has no parameters; the logits come from an encoder. Its prior is uniform over the support. All information is
    in nats.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a code, and of the logits of one example."""

    @property
    @abstractmethod
    def support_size(self) -> int:
        """How many different codes there are."""

    @property
    @abstractmethod
    def independent_rows(self) -> bool:
        """Whether a code is a stack of independent one-hot rows, so that each row has a softmax of its own."""

    @abstractmethod
    def __str__(self) -> str:
        """The spec string that `dgrad.latent` parses back into this layer."""

    @abstractmethod
    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Noise such that `argmax(logits + noise)` samples the code (for categorical rows: i.i.d. Gumbel(0, 1), exactly).

        A structured layer may have noise that makes it a perturb-and-MAP draw instead, and a `sample` of its own that draws from `q`.
        """

    @abstractmethod
    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """The most probable code for the given potentials (the MAP solver), in their dtype; any number of leading axes."""

    @abstractmethod
    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        """The relaxed argmax: differentiable, and `argmax(potentials)` as the temperature goes to 0."""

    @abstractmethod
    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """`E_q[z]`, the marginal probability of every coordinate; differentiable in the logits."""

    @abstractmethod
    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        """`log q(z)`, in nats; codes `[S, 1, *code]` are shared by the whole batch."""

    @abstractmethod
    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        """`-E_q[log q(z)]`, in nats."""

    @abstractmethod
    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        """`KL(q || uniform)`, exact, in nats."""

    @abstractmethod
    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        """By how much `<weights, z>` changes when one coordinate of `z` is changed, for every coordinate.

        `weights` broadcast against the codes.
        """

    @property
    def changes(self) -> int:
        """In how many ways one variable of a code can be changed by itself; 0 where a layer does not say how (see `neighbours`)."""
        return self.shape[0] * (self.shape[1] - 1) if self.independent_rows else 0

    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        """Every code that differs from these in one variable. Rows need none of it: objectives sweep them themselves."""
        raise NotImplementedError(f"{self} does not say how one variable of a code is changed")

    def change_potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        """Potentials `T` by which the neighbours differ from the codes: `<T, z'> - <T, z> = changes`."""
        raise NotImplementedError(f"{self} does not say how one variable of a code is changed")

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of what a decoder sees of a code: all of it, unless the rest follows from a part."""
        return self.shape

    def decoded(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*inputs"]:
        """What a decoder sees of codes, in `decoded_shape`."""
        return codes

    @abstractmethod
    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        """All codes of the support, in the dtype and on the device of `like`.

        Raises:
            InputError: the support is too large to be listed.
        """

    @abstractmethod
    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        """The compact integer form of codes, int64, used in files and in ONNX (for categorical rows `[..., n]`)."""

    @abstractmethod
    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        """The codes of a compact integer form: the inverse of `indices`."""

    @abstractmethod
    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        """The same distribution as an object of `torch.distributions`."""

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Hard codes drawn from `q`, without gradient, in the dtype of the logits."""
        logits = logits.detach()
        return self.argmax(logits + self.noise(logits, samples, generator=generator)).to(logits.dtype)

    @property
    def log_prior(self) -> float:
        """`log p(z)` under the uniform prior, in nats: the same for every code."""
        return -math.log(self.support_size)
