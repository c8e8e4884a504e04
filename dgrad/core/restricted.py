"""Layers whose codes are restricted, and independent codes of one layer: what estimators see of masks and sites."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.distributions import Distribution

from dgrad.core.latent_layer import LatentLayer, check_batch, forbid
from dgrad.core.moves import Moves
from dgrad.errors import InputError

GAP = 1e4
"""A forbidden value lies this many nats below every allowed one, so that its probability is exactly 0.

Far more would lose the digits of differences of logarithms, which estimators without replacement need."""
ENUMERABLE = 2**16
"""The most codes that are listed."""


def visible(tensor: Tensor) -> Any:
    """The tensor's values as a numpy array where reading them is free; None elsewhere.

    It is free on the CPU, outside of `torch.compile` and `torch.func`.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return tensor.detach().numpy()
    except (RuntimeError, TypeError):  # a tensor of torch.func, or one without values
        return None


class Restricted(LatentLayer):
    """A layer whose forbidden coordinates are 0 in every code.

    Logits and potentials of forbidden coordinates are ignored: they may be -inf.

    Args:
        layer: the layer without restrictions.
        allowed: bool, `[B, *layer.shape]`, or `[1, *layer.shape]` for all examples.
        prior: the values over which the prior is uniform, in the same form; None for all of the layer's.
        finite: whether logits come with forbidden coordinates lowered already.
    """

    def __init__(
        self, layer: LatentLayer, allowed: Tensor, prior: Tensor | None = None, *, finite: bool = False
    ) -> None:
        self.layer = layer
        self.allowed = allowed
        self.prior = prior
        self.finite = finite

    def __str__(self) -> str:
        return str(self.layer)

    def defines(self, member: str) -> bool:
        return self.layer.defines(member)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape

    @property
    def one_hot_rows(self) -> bool:
        return self.layer.one_hot_rows

    @property
    def independent_parts(self) -> bool:
        return self.layer.independent_parts

    @property
    def moves(self) -> Moves | None:
        return self.layer.moves

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        return self.layer.decoded_shape

    def decoded(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*inputs"]:
        return self.layer.decoded(codes)

    @property
    def support_size(self) -> int:
        """How many codes an example has at most; on other devices than the CPU without the restrictions."""
        counts = visible(self.allowed.sum(-1)) if self.one_hot_rows else None  # [B, n]
        if counts is None:
            return self.layer.support_size
        return max((math.prod(example) for example in counts.tolist()), default=1)

    # Potentials

    def lowered(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """Potentials with forbidden coordinates so low that no code has them."""
        with torch.no_grad():
            kept = self.allowed_on(potentials.device) & (potentials != -torch.inf)
            if self.one_hot_rows:
                floor = torch.where(kept, potentials, torch.inf).amin(-1, keepdim=True)
            else:  # a code has several coordinates, whose sum counts
                axes = tuple(range(-len(self.shape), 0))
                floor = -torch.where(kept, potentials, 0).abs().sum(axes, keepdim=True)
            floor = floor - (GAP if potentials.dtype != torch.float16 else GAP / 10)
        return torch.where(kept, potentials, floor)

    def free(self, values: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """Values with 0 at forbidden coordinates, and in rows with a single allowed value."""
        return torch.where(self.free_on(values.device), values, 0)

    def allowed_on(self, device: torch.device) -> Tensor:
        """What is allowed, on this device."""
        return self.allowed.to(device)

    def prior_on(self, device: torch.device) -> Tensor:
        """The values of the prior, on this device."""
        return torch.ones_like(self.allowed_on(device)[:1]) if self.prior is None else self.prior.to(device)

    def free_on(self, device: torch.device) -> Tensor:
        """Where a code is free, on this device: what is allowed, but for rows with a single allowed value."""
        allowed = self.allowed_on(device)
        return allowed & (allowed.sum(-1, keepdim=True) > 1) if self.one_hot_rows else allowed

    def _low(self, logits: Tensor) -> Tensor:
        return logits if self.finite else self.lowered(logits)

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        return self.layer.noise(logits, samples, generator=generator)

    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        if self.one_hot_rows:
            return self.layer.argmax(torch.where(self.allowed_on(potentials.device), potentials, -torch.inf))
        return self.layer.argmax(self.lowered(potentials))

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        return self.layer.relax(self._low(potentials), temperature)

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self.layer.mean(self._low(logits))

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        return self.layer.sample(self._low(logits), samples, generator=generator)

    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        return self.layer.linear_sweep(weights, codes)

    # Probabilities

    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        log_q = self.layer.log_prob(self._low(logits), codes)
        if self.finite:
            return log_q
        return forbid(self, log_q, codes, self.allowed_on(codes.device) & (logits != -torch.inf))

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        return self.layer.entropy(self._low(logits))

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        check_batch(self, logits)
        if not self.one_hot_rows:
            return -self.log_prior - self.entropy(logits)
        log_p = self._low(logits).log_softmax(-1)
        # sum_ij p_ij (log p_ij + log of how many values the prior has), exactly 0 for a row with one value
        return (log_p.exp() * (log_p + self._log_counts(logits).unsqueeze(-1))).sum((-2, -1))

    def _log_counts(self, like: Tensor) -> Tensor:
        """The logarithm of how many values the prior gives each row, `[B, n]` or `[1, n]`."""
        return self.prior_on(like.device).sum(-1).to(like.dtype).log()

    @property
    def log_prior(self) -> float | Float[Tensor, " #batch"]:
        """`log p(z)`, in nats: the same for every code of an example."""
        like = torch.zeros((), dtype=torch.float64, device=self.allowed.device)
        if self.one_hot_rows:
            return -self._log_counts(like).sum(-1)
        if self.prior is None:
            return self.layer.log_prior
        # log q of any code with equal logits: the number of allowed codes
        zeros = Restricted(self.layer, self.prior).lowered(self.prior.to(like.dtype) * 0)
        return self.layer.log_prob(zeros, self.layer.argmax(zeros).unsqueeze(0)).squeeze(0)

    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        return self.layer.distribution(self._low(logits))

    # Codes

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        return self.layer.indices(codes)

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        return self.layer.codes(indices, dtype)

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        if len(self.allowed) > 1:
            raise InputError(f"each example has codes of its own in this latent {self}; expected support(logits)")
        if not self.one_hot_rows:
            return self.layer.enumerate(like)
        return self._listed(like)[0].squeeze(1)

    def support(
        self, logits: Float[Tensor, "batch *code"]
    ) -> tuple[Float[Tensor, "codes #batch *code"], Float[Tensor, "codes batch"]]:
        if not self.one_hot_rows:
            return self.layer.support(self._low(logits))
        codes, once = self._listed(logits)
        return codes, torch.where(once, self.log_prob(logits, codes), -torch.inf)

    def _listed(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of each example `[K, B, n, k]`, some again where it has fewer, and whether for the first time."""
        size = self.support_size
        if size > ENUMERABLE:
            raise InputError(f"latent {self} has more than {ENUMERABLE} codes here, too many to list: sample them")
        allowed = self.allowed_on(like.device)
        counts = allowed.sum(-1)  # [B, n]
        values = allowed.int().argsort(dim=-1, descending=True, stable=True)  # [B, n, k], the allowed ones first
        # The number of a code is read as digits, of which row i has counts_i.
        total = counts.flip(-1).cumprod(-1).flip(-1)  # [B, n]
        number = torch.arange(size, device=like.device)  # [K]
        digits = number[:, None, None] // (total // counts) % counts  # [K, B, n]
        chosen = values.expand(size, -1, -1, -1).gather(-1, digits.unsqueeze(-1)).squeeze(-1)
        return self.layer.codes(chosen, like.dtype), number[:, None] < total[:, 0]


class Product(LatentLayer):
    """Independent codes of one layer for each example, its sites.

    The shape is `[parts * n, k]` for rows, and `[parts, *layer.shape]` for other layers.

    Args:
        mask: bool `[B, parts]`; the other parts are zeros, of no information. Not for rows, which `Restricted` pads.
    """

    def __init__(self, layer: LatentLayer, parts: int, mask: Tensor | None = None) -> None:
        self.layer = layer
        self.parts = parts
        self.mask = mask

    def __str__(self) -> str:
        return f"{self.parts} sites of {self.layer}"

    def defines(self, member: str) -> bool:
        return self.layer.defines(member)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.layer.shape
        return (self.parts * shape[0], *shape[1:]) if self.one_hot_rows else (self.parts, *shape)

    @property
    def support_size(self) -> int:
        """How many codes an example has at most; on other devices than the CPU padding counts."""
        return self.layer.support_size**self._most_parts

    @property
    def _most_parts(self) -> int:
        """How many parts of an example are no padding, at most."""
        counts = None if self.mask is None else visible(self.mask.sum(-1))
        return self.parts if counts is None else int(counts.max(initial=0))

    @property
    def one_hot_rows(self) -> bool:
        return self.layer.one_hot_rows

    @property
    def independent_parts(self) -> bool:
        return self.layer.independent_parts

    @property
    def moves(self) -> Moves | None:
        inner = self.layer.moves
        return None if inner is None else _MovesOfParts(self, inner)

    def split(self, whole: Tensor) -> Tensor:
        """`[..., *self.shape]` as `[..., parts, *layer.shape]`."""
        return whole.unflatten(-2, (self.parts, -1)) if self.one_hot_rows else whole

    def join(self, parts: Tensor) -> Tensor:
        """`[..., parts, *layer.shape]` as `[..., *self.shape]`, zeros outside of the mask."""
        if self.one_hot_rows:
            return parts.flatten(-3, -2)
        return parts if self.mask is None else parts * self._mask(parts, len(self.layer.shape))

    def _mask(self, like: Tensor, axes: int) -> Tensor:
        assert self.mask is not None
        return self.mask[(..., *[None] * axes)].to(like.dtype)

    def _sum(self, of_parts: Tensor) -> Tensor:
        """`[..., B * parts]` summed over an example's parts, `[..., B]`."""
        split = of_parts.unflatten(-1, (-1, self.parts))
        return (split if self.mask is None else split * self._mask(split, 0)).sum(-1)

    def _examples(self, logits: Tensor) -> Tensor:
        """`[B, *self.shape]` as `[B * parts, *layer.shape]`."""
        return self.split(logits).flatten(0, 1)

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        noise = self.layer.noise(self._examples(logits), samples, generator=generator)
        return self.join(noise.unflatten(1, (len(logits), self.parts)))

    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self.join(self.layer.argmax(self.split(potentials)))

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        return self.join(self.layer.relax(self.split(potentials), temperature))

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self.join(self.layer.mean(self.split(logits)))

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        codes = self.layer.sample(self._examples(logits), samples, generator=generator)
        return self.join(codes.unflatten(1, (len(logits), self.parts)))

    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        of_parts = self.split(codes).expand(-1, len(logits), *[-1] * (1 + len(self.layer.shape)))
        return self._sum(self.layer.log_prob(self._examples(logits), of_parts.flatten(1, 2)))

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        return self._sum(self.layer.entropy(self._examples(logits)))

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        return self._sum(self.layer.kl(self._examples(logits)))

    @property
    def log_prior(self) -> float | Float[Tensor, " #batch"]:
        """`log p(z)`, in nats: the same for every code of an example."""
        return self.layer.log_prior * (self.parts if self.mask is None else self.mask.sum(-1))

    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        return self.join(self.layer.linear_sweep(self.split(weights), self.split(codes)))

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        codes = self._listed(like, self.parts)
        return codes.flatten(1, 2) if self.one_hot_rows else codes

    def _listed(self, like: Tensor, parts: int) -> Tensor:
        """Every code of so many parts, `[K, parts, *layer.shape]`."""
        if self.layer.support_size**parts > ENUMERABLE:
            raise InputError(f"latent {self} has more than {ENUMERABLE} codes, too many to list: sample them")
        codes = self.layer.enumerate(like)
        numbers = torch.arange(len(codes), device=like.device)
        return codes[torch.cartesian_prod(*[numbers] * parts).view(-1, parts)]

    def support(
        self, logits: Float[Tensor, "batch *code"]
    ) -> tuple[Float[Tensor, "codes #batch *code"], Float[Tensor, "codes batch"]]:
        if self.mask is None:
            codes = self.enumerate(like=logits).unsqueeze(1)  # [K, 1, *code]
            return codes, self.log_prob(logits, codes)
        most = self._most_parts
        listed = self._listed(logits, most).unsqueeze(1) if most else logits.new_zeros(1, 1, 0, *self.layer.shape)
        # Each example has them at the parts of its own that are no padding.
        order = self.mask.int().argsort(dim=-1, descending=True, stable=True)[:, :most]  # [B, most]
        places = order[(None, ..., *[None] * len(self.layer.shape))].expand(len(listed), -1, -1, *self.layer.shape)
        codes = logits.new_zeros(len(listed), *logits.shape)
        codes = self.join(codes.scatter(2, places, listed.expand_as(places)))
        # An example with fewer parts has one code for the rest, the first: others of the list are that code again.
        first = (listed == listed[:1]).flatten(3).all(-1)  # [K, 1, most]
        once = (first | self.mask.gather(1, order)).all(-1)
        return codes, torch.where(once, self.log_prob(logits, codes), -torch.inf)

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        indices = self.layer.indices(self.split(codes))
        return indices.flatten(-2) if self.one_hot_rows else indices

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        split = indices.unflatten(-1, (self.parts, -1)) if self.one_hot_rows else indices
        return self.join(self.layer.codes(split, dtype))

    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        raise InputError(f"no torch distribution of {self}; expected that of a site, as of {self.layer}")


class _MovesOfParts(Moves):
    """A code is changed by changing one of its parts."""

    def __init__(self, layer: Product, inner: Moves) -> None:
        self.layer = layer
        self.inner = inner
        self.count = layer.parts * inner.count

    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        batch, parts = codes.shape[1], self.layer.parts
        moved = self.inner.neighbours(codes.flatten(1, 2)).unflatten(2, (batch, parts))  # [C, S, B, parts, *shape]
        own = torch.eye(parts, dtype=torch.bool, device=codes.device)
        own = own[(slice(None), None, None, None, slice(None), *[None] * (codes.ndim - 3))]  # [parts, 1, 1, 1, parts]
        return self.layer.join(torch.where(own, moved, codes)).flatten(0, 1)

    def potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        batch, parts = codes.shape[1], self.layer.parts
        of_parts = changes.unflatten(0, (parts, -1)).movedim(0, -1).flatten(2)  # [C, S, B * parts]
        return self.layer.join(self.inner.potentials(codes.flatten(1, 2), of_parts).unflatten(1, (batch, parts)))
