"""The checks of a latent layer, one function each: everything that it says of itself against enumeration.

`check(layer)` raises an AssertionError, or NotApplicable. Draws are held to a chi-squared statistic below its 1 - 1e-6
quantile: one false alarm in a million for each example, were the seeds not fixed.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import LatentLayer, LogLinear
from dgrad.errors import InputError
from dgrad.testing._problems import small_logits
from dgrad.testing._shared import (
    NotApplicable,
    needs_cuda,
    needs_small_support,
    no_waiting,
    no_waiting_on_cuda,
    other_strides,
)

DRAWS = 10_000
QUANTILE = 4.7534
"""Of the normal distribution, at 1 - 1e-6."""
LEAST_EXPECTED = 5.0
"""Draws of a code. Codes with fewer are counted together, as a chi-squared statistic demands."""
BATCH = 3
FALLEN = 1e-6
"""A temperature that is as good as 0."""

LatentCheck = Callable[[LatentLayer], None]
LATENT_CHECKS: list[LatentCheck] = []
"""Every check of a latent layer, in the order in which they run."""


def _check(function: LatentCheck) -> LatentCheck:
    LATENT_CHECKS.append(function)
    return function


# The codes


@_check
def spec(layer: LatentLayer) -> None:
    """The layer survives a copy, a pickle and its own spec string."""
    assert copy.deepcopy(layer) == layer, "a deep copy is another layer; expected a frozen dataclass"
    name = str(layer).partition(":")[0]
    if ":" in str(layer) and name not in dgrad.latents():
        raise NotApplicable(f"no latent is registered as {name!r}")
    assert pickle.loads(pickle.dumps(layer)) == layer, "its pickle is another layer; expected a frozen dataclass"
    assert dgrad.latent(str(layer)) == layer, f"dgrad.latent({str(layer)!r}) is another layer"


@_check
def shapes_and_dtypes(layer: LatentLayer) -> None:
    """Float64, float32 and bfloat16: shapes and dtypes, for any leading axes and none in the batch."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for batch in (BATCH, 0):
            logits = small_logits(layer, batch=batch).to(dtype)
            codes = layer.sample(logits, 2, generator=_generator())
            _expect("sample", codes, (2, batch, *layer.shape), dtype)
            _expect("argmax", layer.argmax(logits.expand(2, *logits.shape)), (2, batch, *layer.shape), dtype)
            _expect("decoded", layer.decoded(codes), (2, batch, *layer.decoded_shape), dtype)
            for name in _defined(layer, "mean"):
                _expect(name, layer.mean(logits.expand(2, *logits.shape)), (2, batch, *layer.shape), dtype)
            for name in _defined(layer, "log_prob"):
                _expect(name, layer.log_prob(logits, codes), (2, batch), dtype)
                _expect(f"{name} of shared codes", layer.log_prob(logits, codes[:, :1]), (2, batch), dtype)
            for name in _defined(layer, "entropy", "kl"):
                _expect(name, getattr(layer, name)(logits), (batch,), dtype)
            for name in _defined(layer, "noise"):
                wide = torch.promote_types(dtype, torch.float32)
                _expect(name, layer.noise(logits, 2, generator=_generator()), (2, batch, *layer.shape), wide)
            for name in _defined(layer, "relax"):
                _expect(name, layer.relax(logits.expand(2, *logits.shape), 0.5), (2, batch, *layer.shape), dtype)


@_check
def support(layer: LatentLayer) -> None:
    """`enumerate` lists `support_size` different codes of zeros and ones, each the MAP of itself."""
    codes = _support(layer)
    assert codes.shape == (layer.support_size, *layer.shape), (
        f"enumerate gives {list(codes.shape)}; expected {[layer.support_size, *layer.shape]}, by support_size and shape"
    )
    assert ((codes == 0) | (codes == 1)).all(), "enumerate gives codes that are not zeros and ones"
    assert len(codes.flatten(1).unique(dim=0)) == len(codes), "enumerate gives a code twice"
    assert torch.equal(layer.argmax(2 * codes - 1), codes), "argmax(2z - 1) of a code z is another code"


@_check
def indices_and_codes(layer: LatentLayer) -> None:
    """The integer form is int64, differs from code to code and leads back to the code."""
    codes = _support(layer)
    integers = layer.indices(codes)
    assert integers.dtype == torch.int64, f"indices are {integers.dtype}; expected int64"
    assert len(integers.flatten(1).unique(dim=0)) == len(codes), "two codes have the same indices"
    for dtype in (torch.float64, torch.float32):
        again = layer.codes(integers, dtype)
        assert again.dtype == dtype, f"codes are {again.dtype}; expected {dtype}"
        assert torch.equal(again.double(), codes), "codes(indices(z)) is another code"
    lead = codes[: len(codes) // 2 * 2].unflatten(0, (2, -1))
    assert torch.equal(layer.codes(layer.indices(lead), lead.dtype), lead), "with another leading axis it fails"


@_check
def argmax(layer: LatentLayer) -> None:
    """The MAP code has the largest `<potentials, z>`, for many leading axes and other strides too."""
    potentials, codes = small_logits(layer, batch=64), _support(layer)
    best = (potentials.flatten(1) @ codes.flatten(1).T).argmax(-1)
    for name, given in (("", potentials), (" of other strides", other_strides(potentials))):
        found = layer.argmax(given)
        value, largest = ((z * potentials).flatten(1).sum(-1) for z in (found, codes[best]))
        worst = int((largest - value).argmax())
        assert torch.equal(found, codes[best]), (
            f"the argmax{name} has <potentials, z> = {float(value[worst]):.5g}; expected {float(largest[worst]):.5g}"
        )
    lead = potentials.unflatten(0, (4, 4, 4))
    assert torch.equal(layer.argmax(lead).flatten(0, 2), codes[best]), "with more leading axes it is another code"


# The distribution


@_check
def log_prob(layer: LatentLayer) -> None:
    """`log q` of all codes is that of enumeration, and their probabilities add up to 1."""
    _needs(layer, "log_prob")
    logits, codes = _problem(layer)
    log_q = layer.log_prob(logits, codes.unsqueeze(1))
    _close("the sum of all probabilities", log_q.exp().sum(0), torch.ones_like(log_q[0]))
    _close("log_prob", log_q, _log_q(layer, logits, codes).T)
    _close(
        "log_prob of codes that are not shared",
        layer.log_prob(logits, codes.unsqueeze(1).expand(-1, BATCH, *layer.shape)),
        log_q,
    )


@_check
def mean(layer: LatentLayer) -> None:
    """`mean` is `E_q[z]` by enumeration, in every mode and dtype, and for many leading axes."""
    _needs(layer, "mean")
    logits, codes = _problem(layer)
    truth = _mean(layer, logits, codes)
    _close("mean", layer.mean(logits), truth)
    _close("mean of other strides", layer.mean(other_strides(logits)), truth)
    _close("mean with more leading axes", layer.mean(logits.expand(2, 2, *logits.shape))[1, 1], truth)
    _close("mean in float32", layer.mean(logits.float()).double(), truth, tolerance=1e-5)
    with torch.no_grad():
        _close("mean under no_grad", layer.mean(logits), truth)
    with torch.inference_mode():
        _close("mean under inference_mode", layer.mean(logits.clone()), truth)


@_check
def entropy_and_kl(layer: LatentLayer) -> None:
    """`entropy` and `kl` are those of enumeration; the KL of equal logits is 0."""
    _needs(layer, "entropy", "kl")
    logits, codes = _problem(layer)
    _close("entropy", layer.entropy(logits), _entropy(layer, logits, codes))
    _close("kl", layer.kl(logits), math.log(layer.support_size) - _entropy(layer, logits, codes))
    _close("kl of equal logits", layer.kl(torch.zeros_like(logits).float()), torch.zeros(BATCH), tolerance=1e-5)


@_check
def derivatives(layer: LatentLayer) -> None:
    """First and second derivatives of `mean`, `kl` and `log_prob` are those of enumeration."""
    logits, codes = _problem(layer)
    weight, toward = (small_logits(layer, batch=BATCH, seed=seed) for seed in (1, 2))
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "mean": (lambda x: layer.mean(x) * weight, lambda x: _mean(layer, x, codes) * weight),
        "entropy": (layer.entropy, lambda x: _entropy(layer, x, codes)),
        "kl": (layer.kl, lambda x: -_entropy(layer, x, codes)),
        "log_prob": (
            lambda x: layer.log_prob(x, codes[:1].unsqueeze(1)),
            lambda x: _log_q(layer, x, codes)[:, 0],
        ),
    }
    for name in _defined(layer, *pairs):
        results = []
        for function in pairs[name]:
            leaf = logits.clone().requires_grad_()
            (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
            assert first.requires_grad, f"the derivative of {name} cannot be differentiated"
            (second,) = torch.autograd.grad((first * toward).sum(), leaf)
            results.append((first.detach(), second))
        for order, got, truth in zip(("first", "second"), *results, strict=True):
            _close(f"the {order} derivative of {name}", got, truth)


@_check
def distribution(layer: LatentLayer) -> None:
    """The object of `torch.distributions` has the same mean, entropy and probabilities."""
    _needs(layer, "log_prob", "mean", "entropy")
    logits, codes = _problem(layer)
    other = layer.distribution(logits)
    _close("the distribution's mean", other.mean, layer.mean(logits))
    _close("the distribution's entropy", other.entropy(), layer.entropy(logits))
    of_first = other.log_prob(codes[0].expand_as(logits))
    _close("the distribution's log_prob", of_first, layer.log_prob(logits, codes[:1].unsqueeze(1))[0])
    assert other.sample((2,)).shape == (2, *logits.shape), "the distribution's samples have another shape"


@_check
def extreme_logits(layer: LatentLayer) -> None:
    """Logits of +-1e4 and logits that are all equal give finite values and finite derivatives."""
    signs = small_logits(layer, batch=8).sign()
    for given in (signs * 1e4, signs * 0, signs * 0 + 1e4):
        logits = given.float().requires_grad_()
        span = f"logits from {float(given.min()):g} to {float(given.max()):g}"
        values = _values(layer, logits, layer.sample(logits, generator=_generator()), 0.1)
        for name, value in values.items():
            assert value.isfinite().all(), f"{name} is not finite for {span}"
            (slope,) = torch.autograd.grad(value.sum(), logits)
            assert slope.isfinite().all(), f"the derivative of {name} is not finite for {span}"
        if "log_prob" in values:
            largest = float(values["log_prob"].detach().max())
            assert largest < 1e-2, f"a draw has log_prob {largest:g} for {span}; expected at most 0"


# Draws


@_check
def sample(layer: LatentLayer) -> None:
    """Draws have the frequencies of `q`, by a chi-squared statistic, for each example of a batch."""
    logits, codes = _problem(layer)
    draws = layer.sample(logits, DRAWS, generator=_generator())
    assert not draws.requires_grad, "sample gives codes with a gradient"
    _frequencies("sample", layer, logits, codes, draws)


@_check
def noise(layer: LatentLayer) -> None:
    """Noise is finite. Where a code's parts are independent, `argmax(logits + noise)` is a draw of `q`."""
    _needs(layer, "noise")
    logits = small_logits(layer, batch=BATCH)
    noise = layer.noise(logits, DRAWS, generator=_generator())
    assert noise.isfinite().all(), "noise is not finite"
    if not layer.independent_parts:
        raise NotApplicable("its parts are not independent: argmax(logits + noise) need be no draw of q")
    _frequencies("argmax(logits + noise)", layer, logits, _support(layer), layer.argmax(logits + noise))


@_check
def generator(layer: LatentLayer) -> None:
    """With a generator given draws repeat, and the global generator's state does not move."""
    logits = torch.zeros(64, *layer.shape)
    for name in ("sample", *_defined(layer, "noise")):
        before, draw = torch.get_rng_state(), getattr(layer, name)
        first, again, other = (draw(logits, generator=_generator(seed)) for seed in (7, 7, 8))
        assert torch.equal(torch.get_rng_state(), before), f"{name} moves the global generator's state"
        assert torch.equal(first, again), f"{name} with the same generator gives other draws"
        assert not torch.equal(first, other), f"{name} with another generator gives the same draws"
        assert not torch.equal(first, first[:, :1].expand_as(first)), f"{name} gives every example the same draw"


# What estimators ask


@_check
def relax(layer: LatentLayer) -> None:
    """The relaxed argmax is differentiable, and the argmax as the temperature falls."""
    _needs(layer, "relax")
    potentials = small_logits(layer, batch=BATCH).requires_grad_()
    _close(
        "relax at a temperature of 1e-6", layer.relax(potentials, FALLEN).detach(), layer.argmax(potentials.detach())
    )
    warm = layer.relax(potentials, torch.tensor(0.5))
    (slope,) = torch.autograd.grad((warm * small_logits(layer, batch=BATCH, seed=1)).sum(), potentials)
    assert slope.isfinite().all(), "the derivative of relax is not finite"
    assert (slope != 0).any(), "the derivative of relax is zero everywhere"


@_check
def moves(layer: LatentLayer) -> None:
    """Neighbours are codes of zeros and ones. Their potentials are exact for linear losses."""
    if layer.moves is None:
        raise NotApplicable("it does not say how a code is changed")
    logits = small_logits(layer, batch=BATCH)
    codes = layer.sample(logits, 2, generator=_generator())
    neighbours = layer.moves.neighbours(codes)
    _expect("neighbours", neighbours, (layer.moves.count, *codes.shape), codes.dtype)
    assert ((neighbours == 0) | (neighbours == 1)).all(), "neighbours are not zeros and ones"
    differs = (neighbours != codes).flatten(3).any(-1)  # [C, S, B]
    assert differs.any(0).all(), "a code has no neighbour but itself"
    of_one = neighbours[:, 0, 0][differs[:, 0, 0]].flatten(1)
    assert len(of_one.unique(dim=0)) == len(of_one), "a neighbour comes twice"
    weight = small_logits(layer, batch=BATCH, seed=1)
    changes = ((neighbours - codes) * weight).flatten(3).sum(-1)
    potentials = layer.moves.potentials(codes, changes)
    _expect("potentials", potentials, codes.shape, codes.dtype)
    described = ((neighbours - codes) * potentials).flatten(3).sum(-1)
    _close("<T, z'> - <T, z>", described, changes, tolerance=1e-6)


@_check
def linear_sweep(layer: LatentLayer) -> None:
    """For one-hot rows: the change of `<weights, z>` with each row set to each value."""
    if not layer.one_hot_rows:
        raise NotApplicable("a code is no stack of one-hot rows")
    codes = layer.sample(small_logits(layer, batch=BATCH), 2, generator=_generator())
    weights = small_logits(layer, batch=BATCH, seed=1)
    possible = layer.mean(torch.zeros_like(weights)) > 0  # rows may be of different sizes
    truth = weights - (weights * codes).sum(-1, keepdim=True)
    _close("linear_sweep", layer.linear_sweep(weights, codes) * possible, truth * possible)


@_check
def asks_the_device_nothing(layer: LatentLayer) -> None:
    """Nothing that a training step does would wait for the values of a tensor."""
    with no_waiting():
        _training_step(layer, "cpu")


@_check
def other_devices(layer: LatentLayer) -> None:
    """On CUDA everything stays there, and nothing waits for the device."""
    needs_cuda()
    _training_step(layer, "cuda")  # the first call may allocate and compile
    with no_waiting_on_cuda():
        results = _training_step(layer, "cuda")
    for tensor in results:
        assert tensor.is_cuda, "a result is not on CUDA"


def _training_step(layer: LatentLayer, device: str) -> list[Tensor]:
    """Everything that an estimator may ask, and a backward pass."""
    logits = small_logits(layer, batch=BATCH).float().to(device).requires_grad_()
    source = Generator(device).manual_seed(0)
    codes = layer.sample(logits, 2, generator=source)
    results = [codes, layer.argmax(logits.detach()), layer.decoded(codes), layer.indices(codes)]
    learned = list(_values(layer, logits, codes, torch.ones((), device=device)).values())
    for _ in _defined(layer, "noise"):
        results.append(layer.noise(logits, 2, generator=source))
    if layer.moves is not None:
        results.append(layer.moves.neighbours(codes))
        results.append(layer.moves.potentials(codes, torch.ones_like(results[-1].flatten(3)[..., 0])))
    if learned:
        results += torch.autograd.grad(torch.stack([tensor.sum() for tensor in learned]).sum(), logits)
    return results + learned


# What the checks share


def _generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def _support(layer: LatentLayer) -> Tensor:
    """The support, in float64."""
    needs_small_support(layer)
    try:
        return layer.enumerate(like=torch.zeros((), dtype=torch.float64))
    except InputError as error:
        raise NotApplicable(str(error)) from None


def _problem(layer: LatentLayer) -> tuple[Tensor, Tensor]:
    """Logits of a few examples and the support."""
    return small_logits(layer, batch=BATCH), _support(layer)


def _log_q(layer: LatentLayer, logits: Tensor, codes: Tensor) -> Tensor:
    """`[B, K]` by enumeration of a log-linear family; of others what they say themselves."""
    if isinstance(layer, LogLinear) or layer.one_hot_rows:
        return (logits.flatten(1) @ codes.flatten(1).T).log_softmax(-1)
    _needs(layer, "log_prob")
    return layer.log_prob(logits, codes.unsqueeze(1)).T


def _mean(layer: LatentLayer, logits: Tensor, codes: Tensor) -> Tensor:
    return (_log_q(layer, logits, codes).exp() @ codes.flatten(1)).view_as(logits)


def _entropy(layer: LatentLayer, logits: Tensor, codes: Tensor) -> Tensor:
    log_q = _log_q(layer, logits, codes)
    return -(log_q.exp() * log_q).sum(-1)


def _needs(layer: LatentLayer, *members: str) -> None:
    for member in members:
        if not layer.defines(member):
            raise NotApplicable(f"it does not define {member}")


def _defined(layer: LatentLayer, *members: str) -> Iterator[str]:
    return (member for member in members if layer.defines(member))


def _values(layer: LatentLayer, logits: Tensor, codes: Tensor, temperature: float | Tensor) -> dict[str, Tensor]:
    """Everything differentiable that the layer says of q."""
    asked: dict[str, Callable[[], Tensor]] = {
        "mean": lambda: layer.mean(logits),
        "entropy": lambda: layer.entropy(logits),
        "kl": lambda: layer.kl(logits),
        "log_prob": lambda: layer.log_prob(logits, codes),
        "relax": lambda: layer.relax(logits, temperature),
    }
    return {name: value() for name, value in asked.items() if layer.defines(name)}


def _expect(name: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert got.shape == shape, f"{name} has shape {list(got.shape)}; expected {list(shape)}"
    assert got.dtype == dtype, f"{name} is {got.dtype}; expected {dtype}"


def _close(name: str, got: Tensor, truth: Tensor, *, tolerance: float = 1e-7) -> None:
    assert got.shape == truth.shape, f"{name} has shape {list(got.shape)}; expected {list(truth.shape)}"
    error = (got - truth).abs() - tolerance * (1 + truth.abs())
    worst = int(torch.where(error.isnan(), torch.inf, error).argmax())
    assert (error <= 0).all(), (
        f"{name} is off: coordinate {worst} is {float(got.flatten()[worst]):.6g}, "
        f"by enumeration {float(truth.flatten()[worst]):.6g}"
    )


def _frequencies(name: str, layer: LatentLayer, logits: Tensor, codes: Tensor, draws: Tensor) -> None:
    """Compare draws `[S, B, *code]` with the probabilities of the codes."""
    keys, order = _keys(codes.unsqueeze(1)).squeeze(1).sort()
    number = order[torch.searchsorted(keys, _keys(draws)).clamp(max=len(codes) - 1)]  # [S, B]
    assert torch.equal(codes[number], draws), f"{name} gives codes that enumerate does not list"
    expected = len(draws) * _log_q(layer, logits, codes).exp()  # [B, K]
    for example in range(len(logits)):
        counts = torch.bincount(number[:, example], minlength=len(codes)).double()
        rare = expected[example] < LEAST_EXPECTED
        of_groups = [torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts, expected[example])]
        found, wanted = (x[of_groups[1] >= LEAST_EXPECTED] for x in of_groups)
        freedom = len(wanted) - 1
        if freedom < 1:
            continue
        statistic = float(((found - wanted).square() / wanted).sum())
        # the approximation of Wilson and Hilferty
        limit = freedom * (1 - 2 / (9 * freedom) + QUANTILE * math.sqrt(2 / (9 * freedom))) ** 3
        worst = int(((found - wanted).square() / wanted).argmax())
        assert statistic < limit, (
            f"{name} has other frequencies than q: chi-squared {statistic:.4g} with {freedom} degrees of freedom, "
            f"expected below {limit:.4g}; one code came {int(found[worst])} times, expected {float(wanted[worst]):.1f}"
        )


def _keys(codes: Tensor) -> Tensor:
    """A whole number for each code of `[S, B, *code]`, which differs from code to code."""
    bits = codes.flatten(2).long()
    return (bits * torch.randint(2**50, bits.shape[-1:], generator=_generator())).sum(-1)
