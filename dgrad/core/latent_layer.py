"""The contract of a latent layer: a family of distributions over discrete codes.

The axis contract of the whole project stands here, once. A *code* has the shape of the logits of one example:
`layer.shape`. Categorical variables have `n x k` one-hot rows, categories last. The batch `B` stands in front. Sampled
codes have the samples `S` in front of the batch:

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

Logits = Float[Tensor, "batch *code"]
"""One distribution for each example."""


class Moves(ABC):
    """How one variable of a code is changed by itself, in a layer without one-hot rows."""

    count: int
    """In how many ways a code can be changed."""

    @abstractmethod
    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        """Every code that differs from these in one variable."""

    @abstractmethod
    def potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        """Potentials `T` by which the neighbours differ from the codes: `<T, z'> - <T, z> = changes`."""


class LatentLayer(ABC):
    """A family of distributions over codes, log-linear in the code: `log q(z) = <logits, z> - log Z`.

    A layer has no parameters: the logits come from an encoder. Its prior is uniform over the support. All information
    is in nats.
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
    def one_hot_rows(self) -> bool:
        """Whether a code is a stack of independent one-hot rows, each with a softmax of its own."""

    @property
    def independent_parts(self) -> bool:
        """Whether the variables of a code are independent, so that `argmax(logits + noise)` is a draw from `q`."""
        return self.one_hot_rows

    @property
    def moves(self) -> Moves | None:
        """How one variable of a code is changed by itself, or None. One-hot rows need none: objectives sweep them."""
        return None

    @abstractmethod
    def __str__(self) -> str:
        """The spec string that `dgrad.latent` parses back into this layer."""

    @abstractmethod
    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Noise such that `argmax(logits + noise)` samples the code: i.i.d. Gumbel(0, 1) for categorical rows.

        On a structured layer the argmax may be a perturb-and-MAP draw. Its `sample` then draws from `q`.
        """

    @abstractmethod
    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """The most probable code (the MAP solver), in the potentials' dtype; any number of leading axes."""

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

    # Overridden by layers with forbidden values, `dgrad.core.restricted`

    def lowered(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """Potentials with forbidden coordinates so low that no code has them."""
        return potentials

    def free(self, values: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """Values with 0 at coordinates that no choice is left for: forbidden ones, and padding."""
        return values

    def support(
        self, logits: Float[Tensor, "batch *code"]
    ) -> tuple[Float[Tensor, "codes #batch *code"], Float[Tensor, "codes batch"]]:
        """Every code of each example, and its `log q`. An example with fewer codes has some again, at -inf.

        Raises:
            InputError: the support is too large to be listed.
        """
        codes = self.enumerate(like=logits).unsqueeze(1)
        return codes, self.log_prob(logits, codes)

    @property
    def log_prior(self) -> float | Float[Tensor, " #batch"]:
        """`log p(z)` under the uniform prior, in nats: the same for every code of an example."""
        return -math.log(self.support_size)
