"""The contract of a latent layer: a family of distributions over discrete codes.

The axis contract of the whole project stands here, once. A *code* has the shape of the logits of one example:
`layer.shape`. Categorical variables have `n x k` one-hot rows, categories last. The batch `B` stands in front. Sampled
codes have the samples `S` in front of the batch:

    logits  [B, *shape]        one distribution for each example
    codes   [S, B, *shape]     samples, hard: zeros and ones, in the logits' dtype
    losses  [S, B]             one number for each code

Every layer is a `LatentLayer`. A structure whose `log q(z)` is `<logits, z> - log Z` is a `LogLinear`: from `log_z`
follow its mean, entropy, KL and probabilities.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.distributions import Distribution

from dgrad.core.moves import Moves
from dgrad.core.random import gumbel
from dgrad.errors import InputError, approx_int

Logits = Float[Tensor, "batch *code"]
"""One distribution for each example."""
LISTED = 16
"""The most coordinates of a code whose support is found by trying every setting: 65,536 of them."""
LOWEST = -1e6
"""The logit of a forbidden value where nobody may look whether there is one."""


class LatentLayer(ABC):
    """A family of distributions over codes.

    A layer has no parameters: the logits come from an encoder. Its prior is uniform over the support. All information
    is in nats. What a layer leaves out raises an InputError where it is used. Estimators that need it refuse the layer.
    """

    spec: ClassVar[str] = ""
    """The text of the layer, with its whole-number fields in braces: `subset:{size}of{items}`."""
    least: ClassVar[int] = 1
    """The least number that `parse` takes for a field."""

    def __str__(self) -> str:
        """The spec string that `dgrad.latent` parses back into this layer."""
        return self.spec.format_map(vars(self)) if self.spec else repr(self)

    @classmethod
    def parse(cls, text: str) -> LatentLayer:
        """The layer whose `spec` has this text behind its colon.

        Raises:
            InputError: the text does not fit.
        """
        form = cls.spec.partition(":")[2]
        match = re.fullmatch(re.sub(r"{(\w+)}", r"(?P<\1>[0-9]{1,9})", form), text)
        numbers = {name: int(number) for name, number in match.groupdict().items()} if match else {}
        if match is None or any(number < cls.least for number in numbers.values()):
            expected = re.sub(r"{(\w+)}", lambda field: field[1].upper(), cls.spec)
            raise InputError(f"cannot read {text!r}; expected {expected} with whole numbers of at least {cls.least}")
        return cls(**numbers)

    # ---- Must be defined ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a code, and of the logits of one example."""

    @property
    @abstractmethod
    def support_size(self) -> int:
        """How many different codes there are."""

    @abstractmethod
    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """The code with the largest `<potentials, z>` (the MAP solver), in their dtype; any number of leading axes."""

    @abstractmethod
    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Hard codes drawn from `q`, without gradient, in the dtype of the logits."""

    @abstractmethod
    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        """The compact integer form of codes, int64, used in files and in ONNX (for categorical rows `[..., n]`)."""

    @abstractmethod
    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        """The codes of a compact integer form: the inverse of `indices`."""

    # ---- May be defined: the distribution -----------------------------------------------------------------------

    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        """`log q(z)`, in nats; codes `[S, 1, *code]` are shared by the whole batch.

        A forbidden code has -inf, without a gradient. Inside an estimator it is a finite number, some -1e4 nats:
        differences of such numbers are needed there.
        """
        raise self._lacks("log_prob")

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """`E_q[z]`, the marginal probability of every coordinate; differentiable in the logits."""
        raise self._lacks("mean")

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        """`-E_q[log q(z)]`, in nats."""
        raise self._lacks("entropy")

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        """`KL(q || uniform)`, exact, in nats."""
        raise self._lacks("kl")

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        """Noise such that `argmax(logits + noise)` samples the code: i.i.d. Gumbel(0, 1) for categorical rows.

        On a structured layer the argmax may be a perturb-and-MAP draw. Its `sample` then draws from `q`.
        """
        raise self._lacks("noise")

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        """The relaxed argmax: differentiable, and `argmax(potentials)` as the temperature goes to 0."""
        raise self._lacks("relax")

    # ---- May be overridden: the structure -----------------------------------------------------------------------

    @property
    def one_hot_rows(self) -> bool:
        """Whether a code is a stack of independent one-hot rows, each with a softmax of its own."""
        return False

    @property
    def independent_parts(self) -> bool:
        """Whether the variables of a code are independent, so that `argmax(logits + noise)` is a draw from `q`."""
        return self.one_hot_rows

    @property
    def moves(self) -> Moves | None:
        """How a code is changed a little, or None. One-hot rows need none: objectives sweep them."""
        return None

    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        """By how much `<weights, z>` changes when a one-hot row is set to each of its values.

        `weights` broadcast against the codes.
        """
        raise self._lacks("linear_sweep")

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        """All codes of the support, in the dtype and on the device of `like`.

        By default every setting of zeros and ones is tried, for codes of up to 16 coordinates.

        Raises:
            InputError: the support is too large to be listed.
        """
        if like.device not in self._supports:  # the first time alone waits for the device
            self._supports[like.device] = self._search().to(like.device)
        return self._supports[like.device].to(like.dtype)

    @cached_property
    def _supports(self) -> dict[torch.device, Tensor]:
        """The support as small integers on each device that asked for it."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_supports"}

    def _search(self) -> Tensor:
        coordinates = math.prod(self.shape)
        if coordinates > LISTED:
            raise InputError(
                f"latent {self} has {approx_int(self.support_size)} codes of {coordinates} coordinates, too many to "
                f"list; at most {LISTED} coordinates are, where a layer does not define enumerate"
            )
        with torch.inference_mode(False):  # whose tensors could not be used elsewhere
            settings = torch.arange(2**coordinates, device="cpu").unsqueeze(-1)
            bits = settings >> torch.arange(coordinates - 1, -1, -1, device="cpu") & 1
            codes = bits.to(torch.int8).view(-1, *self.shape)
            # A code z is the only one with the largest <2z - 1, z>, the number of its ones.
            own = self.argmax(2 * codes.double() - 1) == codes
            return codes[own.flatten(1).all(1)]

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of what a decoder sees of a code: all of it, unless the rest follows from a part."""
        return self.shape

    def decoded(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*inputs"]:
        """What a decoder sees of codes, in `decoded_shape`."""
        return codes

    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        """The same distribution as an object of `torch.distributions`."""
        return CodeDistribution(self, logits)

    # ---- Follows ------------------------------------------------------------------------------------------------

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

    def defines(self, member: str) -> bool:
        """Whether the layer has a member that layers may leave out, such as `noise`. A wrapper asks what it wraps."""
        return getattr(type(self), member) is not getattr(LatentLayer, member)

    def _lacks(self, member: str) -> InputError:
        return InputError(
            f"latent {self} does not define {member}; expected a layer that does: in a dgrad.LogLinear it follows"
        )


class LogLinear(LatentLayer):
    """A family that is log-linear in the code: `log q(z) = <logits, z> - log Z`.

    A structure defines `spec`, `shape`, `support_size`, `argmax`, `sample` and `log_z`, often `moves` too. The rest
    follows. A layer with a faster formula overrides what follows from `log_z`.

    Reference: Wainwright & Jordan 2008, Graphical models, exponential families, and variational inference.
    """

    # ---- Must be defined ----------------------------------------------------------------------------------------

    @abstractmethod
    def log_z(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*batch"]:
        """`log sum_z exp <logits, z>`, in nats; any number of leading axes.

        Its first and second derivatives are used: they must be finite and right for all finite logits.
        """

    # ---- May be overridden --------------------------------------------------------------------------------------

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        potentials = wide(logits)
        if torch.compiler.is_compiling() or not (torch.is_inference_mode_enabled() or potentials.is_inference()):
            return self._slope(potentials).to(logits.dtype)
        with torch.inference_mode(False):  # which would not let anything be differentiated
            return self._slope(potentials.detach().clone()).to(logits.dtype)

    def _slope(self, logits: Tensor) -> Tensor:
        # E_q[z] = d log Z / d l. torch.func differentiates under no_grad too, and its result can be differentiated.
        gradient = torch.func.grad(lambda potentials: self.log_z(potentials).sum())
        return gradient(logits)

    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        potentials = wide(logits)
        # <l, z> - log Z
        log_q = (self._inner(potentials, codes) - self.log_z(potentials)).to(logits.dtype)
        return forbid(self, log_q, codes, logits != -torch.inf)

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        potentials = wide(logits)
        # log Z - <l, E[z]>
        return (self.log_z(potentials) - self._inner(potentials, self.mean(potentials))).to(logits.dtype)

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        potentials = wide(logits)
        # log |support| - H
        return (self._inner(potentials, self.mean(potentials)) - self.log_z(potentials) - self.log_prior).to(
            logits.dtype
        )

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        return gumbel(logits, samples, generator=generator)

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        return self.mean(potentials / temperature)

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        return codes.long()

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        return indices.to(dtype)

    def _inner(self, logits: Tensor, codes: Tensor) -> Tensor:
        return (logits * codes).flatten(-len(self.shape)).sum(-1)


def forbid(layer: LatentLayer, log_q: Tensor, codes: Tensor, allowed: Tensor) -> Tensor:
    """Log-probabilities `[S, B]`, but -inf where a code has a coordinate that is not allowed."""
    forbidden = ((codes.detach() > 0.5) & ~allowed).flatten(-len(layer.shape)).any(-1)
    return torch.where(forbidden, -torch.inf, log_q)


def check_batch(layer: LatentLayer, logits: Tensor) -> None:
    """Make sure that logits are `[B, *layer.shape]`, for what would broadcast to a wrong result of others.

    Raises:
        InputError: they have other axes.
    """
    if logits.shape[1:] != layer.shape:
        axes = ", ".join(map(str, layer.shape))
        raise InputError(
            f"logits of shape {list(logits.shape)} for the latent layer {layer}; expected [batch, {axes}]: for "
            f"sequences [batch, sites, {axes}] take dgrad.restricted(layer, mask=mask)"
        )


def wide(potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
    """Potentials in float32 or wider, in which sums and logarithms are taken, and finite where they were -inf."""
    return potentials.to(torch.promote_types(potentials.dtype, torch.float32)).clamp_min(LOWEST)


class CodeDistribution(Distribution):
    """A latent layer's distribution as an object of `torch.distributions`."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 torch declares it so

    def __init__(self, layer: LatentLayer, logits: Tensor) -> None:
        self.layer, self.logits = layer, logits
        super().__init__(logits.shape[:1], logits.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.layer.mean(self.logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return self.layer.sample(self.logits, shape.numel()).view(*shape, *self.logits.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        codes = value.reshape(-1, *self.logits.shape)
        return self.layer.log_prob(self.logits, codes).view(*value.shape[: value.ndim - len(self.event_shape)])

    def entropy(self) -> Tensor:
        return self.layer.entropy(self.logits)
