"""Sequences, masks and forbidden values, turned into a plain problem: a layer, finite logits, one loss an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.distributions import Distribution

from dgrad.core.arguments import check_layer
from dgrad.core.estimator_tools import check_choice
from dgrad.core.latent_layer import LOWEST, LatentLayer, forbid
from dgrad.core.restricted import GAP, Product, Restricted, visible
from dgrad.errors import InputError

CREDITS = ("example", "site", "future")


def restricted(layer: LatentLayer, *, mask: Tensor | None = None, allowed: Tensor | None = None) -> LatentLayer:
    """The layer of one batch, with its padding and its forbidden values: for `kl`, `entropy` and the rest.

    Estimators and `refine` take `mask` and `allowed` themselves. They take this layer too.

    Args:
        mask: bool `[B, T]`, False where a site is padding. Logits are then `[B, T, *layer.shape]` and codes `[S, B, T,
            *layer.shape]`. A padded site has a code of zeros and no information.
        allowed: bool, False where a value is forbidden. It broadcasts against the logits. The prior is uniform over the
            codes that are allowed.

    Raises:
        InputError: neither is given, or a shape or a dtype is wrong.

    >>> import torch, dgrad
    >>> layer = dgrad.restricted(dgrad.latent("1x4"), allowed=torch.tensor([True, True, False, False]))
    >>> [round(float(value), 3) for value in (layer.entropy(torch.zeros(1, 1, 4)), layer.kl(torch.zeros(1, 1, 4)))]
    [0.693, 0.0]
    """
    check_layer(layer)
    _check_bool("mask", mask)
    _check_bool("allowed", allowed)
    axes = len(layer.shape)
    if mask is not None and mask.ndim != 2:
        raise InputError(f"mask of shape {list(mask.shape)}; expected [batch, sites]")
    if isinstance(layer, Sites):
        if mask is not None and layer.mask is not None and mask.shape != layer.mask.shape:
            raise InputError(
                f"mask of shape {list(mask.shape)} for a layer with one of {list(layer.mask.shape)}; expected the same"
            )
        return Sites(layer.layer, layer.sites, both(layer.mask, mask), both(layer.allowed, allowed))
    if mask is not None:
        return Sites(layer, mask.shape[1], mask, allowed)
    if allowed is None:
        raise InputError("nothing is restricted; expected mask= or allowed=")
    if allowed.ndim == axes + 2:
        return Sites(layer, allowed.shape[1], None, allowed)
    batch = allowed.shape[0] if allowed.ndim > axes else 1
    permitted = _permitted(layer, allowed, torch.Size((batch, *layer.shape)), allowed.device)
    assert permitted is not None
    permitted = _never_empty(layer, permitted)
    return Restricted(_unrestricted(layer), permitted, permitted)


@dataclass(frozen=True)
class Problem:
    """What an estimator gets of a call, and the way back.

    Attributes:
        layer: the layer that the estimator sees.
        logits: `[B', *layer.shape]`, finite, in float32 or wider.
        given: the logits as they were given.
        code_shape: the shape of a code of a site.
        sites: how many sites an example has; None without sites.
        mask: bool `[B, T]`; None without padding.
        credit: `example`, `site` or `future`.
        folded: whether each site is an example of its own, B' = B T.
        only_padding: whether nothing but padding is forbidden.
        permitted: what the layer and the call allow, `[B or 1, (T,) *code_shape]`; None for everything.
        seen_finite: whether the logits were looked at, and none is NaN or +inf.
    """

    layer: LatentLayer
    logits: Float[Tensor, "batch *code"]
    given: Float[Tensor, "*given"]
    code_shape: tuple[int, ...]
    sites: int | None = None
    mask: Bool[Tensor, "b t"] | None = None
    credit: str = "example"
    folded: bool = False
    only_padding: bool = False
    permitted: Tensor | None = None
    seen_finite: bool = False

    @property
    def plain(self) -> bool:
        """Whether the estimator sees codes as they were asked for."""
        return self.sites is None and not isinstance(self.layer, Restricted)

    def codes(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples b *given"]:
        """The estimator's codes as the caller sees them: `[S, B, *code]` or `[S, B, T, *code]`, padding zeros.

        A code of probability 0 is replaced by an allowed one.
        """
        if self.plain:
            return codes
        if isinstance(self.layer, Restricted) and not self.only_padding:
            axes = tuple(range(2, codes.ndim))
            forbidden = ((codes.detach() > 0.5) & ~self.layer.allowed_on(codes.device)).any(axes, keepdim=True)
            best = self.layer.argmax(self.logits.detach()).to(codes.dtype)
            codes = torch.where(forbidden, best, codes)
        if self.sites is None:
            return codes
        if codes.shape[1] != len(self.logits):
            codes = codes.expand(-1, len(self.logits), *codes.shape[2:])
        if self.folded:
            codes = codes.unflatten(1, (len(self.given), self.sites))
        else:
            codes = codes.reshape(*codes.shape[:2], self.sites, *self.code_shape)
        if self.mask is None:
            return codes
        return codes * self.mask[(..., *[None] * len(self.code_shape))].to(codes.dtype)

    def folded_codes(self, codes: Float[Tensor, "samples #b *given"]) -> Float[Tensor, "samples #batch *code"]:
        """Codes as the caller sees them in the form of the estimator's; padding stays zeros."""
        if self.sites is None:
            return codes
        if self.folded:
            return codes.expand(-1, len(self.given), *codes.shape[2:]).flatten(1, 2)
        return codes.reshape(*codes.shape[:2], *self.layer.shape)

    def nan_where_logits_are(self, values: Tensor, batch_axis: int = 0) -> Tensor:
        """The values, but NaN for an example with a logit that is NaN or +inf: they would hide it in a hard code.

        Nothing waits for the device. The gradients of such an example are NaN too.
        """
        if self.seen_finite or not self.logits.numel():
            return values
        # 1 - 0 max: 1 for a number, else NaN
        factor = torch.rsub(self.logits.detach().flatten(1).amax(-1), 1, alpha=0)
        return values * factor.to(values.dtype).view(-1, *[1] * (values.ndim - 1 - batch_axis))

    def losses(self, losses: Float[Tensor, "samples b *sites"]) -> Float[Tensor, "samples batch"]:
        """The caller's losses as the estimator gets them, `[S, B']`."""
        if self.credit == "example":
            return losses
        if self.mask is not None:
            losses = torch.where(self.mask, losses, 0)
        if not self.folded:
            return losses.sum(-1)
        if self.credit == "future":  # the losses that a site's code can change: from it on
            losses = losses.detach().flip(-1).cumsum(-1).flip(-1)
        if self.mask is not None:
            # Averages over the batch shall not see padding.
            count = self.mask.sum().clamp_min(1)
            mean = torch.where(self.mask, losses.detach(), 0).sum((-2, -1), keepdim=True) / count
            losses = torch.where(self.mask, losses, mean)
        return losses.flatten(1)

    def loss(
        self, loss: Float[Tensor, " batch"], losses: Float[Tensor, "samples b *sites"] | None
    ) -> Float[Tensor, " b"]:
        """The estimator's loss as the caller sees it, `[B]`: the sum over the sites of an example.

        Args:
            losses: what the caller's objective gave, for `future`, whose value is no sum of what the estimator got.
        """
        if not self.folded:
            return loss
        loss = loss.unflatten(0, (len(self.given), self.sites or 1))
        if self.mask is not None:
            loss = torch.where(self.mask, loss, 0)
        loss = loss.sum(-1)
        if self.credit != "future":
            return loss
        assert losses is not None
        value = losses if self.mask is None else torch.where(self.mask, losses, 0)
        return value.sum(-1).mean(0) + (loss - loss.detach())

    def refined(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, "*given"]:
        """Logits of the plain problem in the form of those given; -inf where forbidden, as they were at padding."""
        if self.plain:
            return logits
        if isinstance(self.layer, Restricted):
            logits = torch.where(self.layer.allowed_on(logits.device), logits, -torch.inf)
        logits = logits.reshape(self.given.shape)
        if self.mask is None:
            return logits
        return torch.where(self.mask[(..., *[None] * len(self.code_shape))], logits, self.given.to(logits.dtype))


def prepare(
    layer: LatentLayer,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
    credit: str = "example",
    local_losses: bool = False,
) -> Problem:
    """The plain problem of a layer and logits.

    Args:
        logits: `[B, *layer.shape]`, or `[B, T, *layer.shape]`. -inf forbids a value.
        mask, allowed: as for `restricted`.
        credit: what the loss of a site depends on; `GradientEstimator.forward` says it.
        local_losses: whether `future` may give each site the losses from it on, rather than their sum.

    Raises:
        InputError: a shape, a dtype or a choice is wrong, or a row has no allowed value.
    """
    check_layer(layer)
    check_choice("credit", credit, CREDITS)
    _check_bool("mask", mask)
    _check_bool("allowed", allowed)
    if isinstance(layer, Sites):
        mask, allowed, layer = both(layer.mask, mask), both(layer.allowed, allowed), layer.layer
    if not logits.is_floating_point():
        raise InputError(f"logits of {logits.dtype}; expected a floating-point tensor: convert them with .float()")
    axes, given = len(layer.shape), logits
    with_sites = logits.ndim == axes + 2 and logits.shape[2:] == layer.shape
    if not with_sites and logits.shape[1:] != layer.shape:
        expected = ", ".join(map(str, ("batch", *layer.shape)))
        raise InputError(
            f"logits of shape {list(logits.shape)} do not fit the latent layer {layer}; expected [{expected}], "
            f"or [batch, sites, {', '.join(map(str, layer.shape))}] for sequences"
        )
    if not with_sites and (mask is not None or credit != "example"):
        raise InputError(
            f"mask= and credit= are for logits [batch, sites, {', '.join(map(str, layer.shape))}]; "
            f"got {list(logits.shape)}: give each example an axis of sites"
        )
    if mask is not None and mask.shape != logits.shape[:2]:
        raise InputError(f"mask of shape {list(mask.shape)}; expected [batch, sites] = {list(logits.shape[:2])}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    permitted = _permitted(layer, allowed, logits.shape, logits.device)  # [B or 1, (T,) *shape] or None
    prior, layer = permitted, _unrestricted(layer)
    values = visible(logits)
    seen_finite = values is not None and bool(values.max(initial=0.0) < float("inf"))
    reachable = _reachable(logits, permitted)
    if reachable is None and visible(logits) is None:
        logits = logits.clamp_min(LOWEST)
    if not with_sites:
        if reachable is None:
            return Problem(layer, logits, given, layer.shape, seen_finite=seen_finite)
        reachable = _never_empty(layer, reachable)
        limited = Restricted(layer, reachable, prior, finite=True)
        plain = _finite(limited, logits)
        return Problem(limited, plain, given, layer.shape, permitted=permitted, seen_finite=seen_finite)

    sites, code_shape = logits.shape[1], layer.shape
    folded = credit == "site" or (credit == "future" and local_losses)
    whole = layer if folded else Product(layer, sites, None if layer.one_hot_rows else mask)
    only_padding = reachable is None
    if mask is not None and layer.one_hot_rows:
        # A padded site has one allowed value, the first.
        padding = ~mask[..., None, None]
        first = torch.arange(layer.shape[-1], device=mask.device) == 0
        every = torch.ones((1, 1, *layer.shape), dtype=torch.bool, device=mask.device)
        reachable = torch.where(padding, first, every if reachable is None else reachable)
        prior = torch.where(padding, first, every if prior is None else prior)

    if reachable is not None:
        reachable = _never_empty(layer, reachable)

    def fold(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if folded:
            return tensor.expand(len(logits), sites, *code_shape).flatten(0, 1)
        examples = -1 if mask is None else len(logits)  # padding is each example's own
        return tensor.expand(examples, sites, *code_shape).reshape(-1, *whole.shape)

    plain = logits.flatten(0, 1) if folded else logits.reshape(len(logits), *whole.shape)
    if mask is not None and not layer.one_hot_rows:
        of_site = mask.flatten() if folded else mask
        plain = torch.where(of_site[(..., *[None] * axes)], plain, 0)
    reachable = fold(reachable)
    if reachable is not None:
        whole = Restricted(whole, reachable, fold(prior), finite=True)
        plain = _finite(whole, plain, only_padding=only_padding)
    return Problem(whole, plain, given, code_shape, sites, mask, credit, folded, only_padding, permitted, seen_finite)


def plain_shape(layer: LatentLayer) -> tuple[int, ...]:
    """The shape of a code of this layer as an estimator sees it."""
    check_layer(layer)
    if not isinstance(layer, Sites):
        return layer.shape
    return Product(layer.layer, layer.sites).shape


class Sites(LatentLayer):
    """The layer of a batch of sequences, of logits `[B, T, *layer.shape]`: made by `restricted`."""

    def __init__(self, layer: LatentLayer, sites: int, mask: Tensor | None, allowed: Tensor | None) -> None:
        self.layer = layer
        self.sites = sites
        self.mask = mask
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.sites} sites of {self.layer}"

    def defines(self, member: str) -> bool:
        return self.layer.defines(member)

    def _problem(self, logits: Tensor) -> Problem:
        return prepare(self, logits)

    def _whole(self, codes: Tensor) -> Tensor:
        """`[..., T, *shape]` as the plain layer has it."""
        return codes.flatten(-3, -2) if self.layer.one_hot_rows else codes

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.sites, *self.layer.shape)

    @property
    def support_size(self) -> int:
        return self.layer.support_size**self.sites

    @property
    def independent_parts(self) -> bool:
        return self.layer.independent_parts

    def noise(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        problem = self._problem(logits)
        return problem.layer.noise(problem.logits, samples, generator=generator).reshape(-1, *logits.shape)

    def sample(
        self, logits: Float[Tensor, "batch *code"], samples: int = 1, *, generator: Generator | None = None
    ) -> Float[Tensor, "samples batch *code"]:
        problem = self._problem(logits)
        codes = problem.layer.sample(problem.logits.detach(), samples, generator=generator)
        return problem.codes(codes).to(logits.dtype)

    def argmax(self, potentials: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self._of_each(potentials, lambda problem: problem.layer.argmax(problem.logits))

    def relax(self, potentials: Float[Tensor, "*lead"], temperature: float | Tensor) -> Float[Tensor, "*lead"]:
        return self._of_each(potentials, lambda problem: problem.layer.relax(problem.logits, temperature))

    def mean(self, logits: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        return self._of_each(logits, lambda problem: problem.layer.mean(problem.logits))

    def _of_each(self, potentials: Tensor, solve: Any) -> Tensor:
        """`solve` of each `[B, T, *shape]` of potentials that may have more axes in front."""
        axes = len(self.shape) + 1
        results = []
        for one in potentials.reshape(-1, *potentials.shape[-axes:]):
            problem = self._problem(one)
            results.append(problem.codes(solve(problem).unsqueeze(0)).squeeze(0))
        return torch.stack(results).reshape(potentials.shape).to(potentials.dtype)

    def log_prob(
        self, logits: Float[Tensor, "batch *code"], codes: Float[Tensor, "samples #batch *code"]
    ) -> Float[Tensor, "samples batch"]:
        problem = self._problem(logits)
        if self.mask is not None:  # codes at padding count as zeros, which they are
            codes = codes * self.mask[(..., *[None] * len(self.layer.shape))].to(codes.dtype)
        log_q = problem.layer.log_prob(problem.logits, self._whole(codes))
        allowed = logits != -torch.inf
        return forbid(self, log_q, codes, allowed if problem.permitted is None else allowed & problem.permitted)

    def entropy(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        problem = self._problem(logits)
        return problem.layer.entropy(problem.logits)

    def kl(self, logits: Float[Tensor, "batch *code"]) -> Float[Tensor, " batch"]:
        problem = self._problem(logits)
        return problem.layer.kl(problem.logits)

    @property
    def log_prior(self) -> float | Float[Tensor, " #batch"]:
        like = next(tensor for tensor in (self.mask, self.allowed) if tensor is not None)
        zeros = torch.zeros(len(like), *self.shape, dtype=torch.float64, device=like.device)
        return self._problem(zeros).layer.log_prior

    def linear_sweep(
        self, weights: Float[Tensor, "*lead"], codes: Float[Tensor, "samples batch *code"]
    ) -> Float[Tensor, "samples batch *code"]:
        return self.layer.linear_sweep(weights, codes)

    def support(
        self, logits: Float[Tensor, "batch *code"]
    ) -> tuple[Float[Tensor, "codes #batch *code"], Float[Tensor, "codes batch"]]:
        problem = self._problem(logits)
        codes, log_q = problem.layer.support(problem.logits)
        return problem.codes(codes), log_q

    def enumerate(self, like: Tensor) -> Float[Tensor, "support *code"]:
        raise InputError(f"each example has codes of its own in {self}; expected support(logits)")

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        return self.layer.indices(codes)

    def codes(self, indices: Int[Tensor, "*integers"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead"]:
        return self.layer.codes(indices, dtype)

    def distribution(self, logits: Float[Tensor, "batch *code"]) -> Distribution:
        raise InputError(f"no torch distribution of {self}; expected that of a site, as of {self.layer}")


# What a call forbids


def _unrestricted(layer: LatentLayer) -> LatentLayer:
    return layer.layer if isinstance(layer, Restricted) else layer


def _permitted(layer: LatentLayer, allowed: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """What the layer and `allowed` permit, `[B or 1, (T,) *layer.shape]`; None for everything.

    Args:
        shape: of the logits.
    """
    if allowed is not None:
        try:
            fits = torch.broadcast_shapes(allowed.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"allowed of shape {list(allowed.shape)}; expected one that broadcasts to the logits, {list(shape)}"
            )
        allowed = allowed[(*[None] * (len(shape) - allowed.ndim), ...)]
        allowed = allowed.expand(-1, *shape[1:]).to(device)
    if not isinstance(layer, Restricted):
        return allowed
    own = layer.allowed_on(device)
    if len(shape) > own.ndim:  # with sites, which all have the layer's values
        own = own.unsqueeze(1)
    return both(own.expand(-1, *shape[1:]), allowed)


def _reachable(logits: Tensor, permitted: Tensor | None) -> Tensor | None:
    """What is permitted and has no logit of -inf; None for everything. Only on the CPU are logits looked at."""
    values = visible(logits)
    if values is None:
        return None if permitted is None else permitted & (logits != -torch.inf)
    lowest = values.min(initial=0.0)
    if lowest > -float("inf") or (lowest != lowest and not (values == -float("inf")).any()):  # NaN is no number
        return permitted
    return both(logits != -torch.inf, permitted)


def _never_empty(layer: LatentLayer, reachable: Tensor) -> Tensor:
    """`reachable`, where each row has a value.

    Raises:
        InputError: one has none, on the CPU. Elsewhere such a row gets its first value.
    """
    if not layer.one_hot_rows:
        return reachable
    empty = ~reachable.any(-1, keepdim=True)
    values = visible(empty)
    if values is None:
        return reachable | (empty & (torch.arange(layer.shape[-1], device=reachable.device) == 0))
    if values.any():
        *place, row, _ = (int(indices[0]) for indices in values.nonzero())
        raise InputError(
            f"no value of variable {row} is allowed at index {place} of the batch; expected at least one: "
            "mask= marks padding"
        )
    return reachable


def _finite(layer: Restricted, logits: Tensor, *, only_padding: bool = False) -> Tensor:
    """Finite logits. They have a gradient where the code is free, exactly 0 elsewhere, whatever an estimator does."""
    allowed, free = layer.allowed_on(logits.device), layer.free_on(logits.device)
    if not layer.one_hot_rows:
        return torch.where(free, logits, layer.lowered(logits.detach()))
    # a row with a single value may be padding, whose logits may be anything
    decided = torch.where(allowed, 0.0, -GAP).to(logits.dtype)
    if not only_padding:
        decided = torch.where(free.any(-1, keepdim=True), layer.lowered(logits.detach()), decided)
    return torch.where(free, logits, decided)


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Where both are true; None stands for true everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _check_bool(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and not (isinstance(tensor, Tensor) and tensor.dtype == torch.bool):
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"{name} of {found}; expected a tensor of torch.bool: compare, or convert it with .bool()")
