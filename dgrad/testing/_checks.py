"""The checks of the conformance kit, one function each.

`check(estimator, layer)` raises an AssertionError, or NotApplicable. A check gets an instance that nobody else uses,
with `set_layer` called. Statistical checks compare every coordinate of a Monte-Carlo mean with the exact value within 5
standard errors: for a normal mean that is one false alarm in 1.7 million coordinates, one in some 10,000 runs of the
whole list with fresh seeds. The seeds are fixed so that a failure can be repeated.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from dgrad.core.estimates import Estimate
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import CodeLoss, Objective
from dgrad.core.restricted import Product
from dgrad.core.sites import restricted
from dgrad.testing._problems import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad.testing._shared import (
    LARGEST_SUPPORT,
    NotApplicable,
    needs_cuda,
    needs_small_support,
    no_waiting,
    no_waiting_on_cuda,
    other_strides,
)

DRAWS = 20_000
LIMIT_DRAWS = 100_000
STANDARD_ERRORS = 5
ROUNDING = 1e-6
"""Hyper-parameters and learned parts are float32, also where the logits are float64."""

Check = Callable[[GradientEstimator, LatentLayer], None]


CHECKS: list[Check] = []
"""Every check of the kit, in the order in which they run."""


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# The contract


@_check
def shapes_and_dtypes(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Float64, float32 and bfloat16: shapes, hard codes, finite gradients and codes in the logits' dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = small_logits(layer, batch=16).to(dtype).requires_grad_()
        weight = torch.randn(layer.shape, generator=Generator().manual_seed(0)).to(dtype).requires_grad_()
        seen: set[torch.dtype] = set()

        def loss(codes: Tensor, weight: Tensor = weight, seen: set[torch.dtype] = seen) -> Tensor:
            seen.add(codes.dtype)
            return (codes * weight).flatten(2).sum(-1).square()

        estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
        assert estimate.loss.shape == (16,), f"loss of shape {list(estimate.loss.shape)}; expected [16]"
        assert estimate.codes.shape[1:] == logits.shape, f"codes of shape {list(estimate.codes.shape)}"
        hard = layer.argmax(2 * estimate.codes - 1)
        assert torch.equal(estimate.codes, hard), "the codes are not hard: argmax(codes) is something else"
        assert seen == {dtype}, f"the objective got codes of {seen}; expected the dtype of the logits, {dtype}"
        gradients = torch.autograd.grad(estimate.loss.sum(), (logits, weight))
        for name, leaf, gradient in zip(("logits", "decoder"), (logits, weight), gradients, strict=True):
            assert gradient.dtype == leaf.dtype, f"the gradient of the {name} is {gradient.dtype}; expected {dtype}"
            assert gradient.isfinite().all(), f"the gradient of the {name} is not finite in {dtype}"


@_check
def values_without_gradients(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Under `torch.no_grad()` and `torch.inference_mode()` the loss and the codes are the same."""
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["smooth"]
    loud = _estimate(estimator, layer, logits.clone().requires_grad_(), loss, seed=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = _estimate(estimator, layer, logits, loss, seed=1)
        assert torch.equal(quiet.codes.clone(), loud.codes), f"other codes under {mode.__name__}"
        torch.testing.assert_close(quiet.loss.clone(), loud.loss.detach())
        assert not quiet.loss.requires_grad, f"the loss has a gradient under {mode.__name__}"


@_check
def non_contiguous_logits(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Logits with other strides give the same gradient."""
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["smooth"]
    gradients = [_gradient(estimator, layer, given, loss) for given in (other_strides(logits), logits)]
    torch.testing.assert_close(*gradients)


@_check
def other_devices(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """On CUDA, loss, codes and gradients stay there."""
    needs_cuda()
    estimator.cuda()
    logits = small_logits(layer, batch=16).float().cuda().requires_grad_()
    loss = small_objectives(layer, device="cuda")["smooth"]
    estimate = estimator(layer, logits, loss, generator=Generator("cuda").manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    for tensor in (estimate.loss, estimate.codes, gradient):
        assert tensor.is_cuda
        assert tensor.isfinite().all()


@_check
def no_host_synchronisation(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """On CUDA, nothing in an estimate or its backward pass waits for the device."""
    needs_cuda()
    estimator.cuda()
    logits = small_logits(layer, batch=16).float().cuda().requires_grad_()
    loss, generator = small_objectives(layer, device="cuda")["smooth"], Generator("cuda").manual_seed(0)
    estimator(layer, logits, loss, generator=generator).loss.sum().backward()  # the first call may allocate and compile
    with no_waiting_on_cuda():
        estimator(layer, logits, loss, generator=generator).loss.sum().backward()


@_check
def asks_the_device_nothing(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Nothing would wait for the values of a tensor, and its buffers keep their place in memory."""
    logits = small_logits(layer, batch=16).requires_grad_()
    loss, generator = small_objectives(layer)["smooth"], Generator().manual_seed(0)
    estimator(layer, logits, loss, generator=generator).loss.sum().backward()
    addresses = {name: buffer.data_ptr() for name, buffer in estimator.named_buffers()}
    with no_waiting():
        estimator(layer, logits, loss, generator=generator).loss.sum().backward()
    for name, buffer in estimator.named_buffers():
        assert buffer.data_ptr() == addresses[name], (
            f"it replaces its buffer {name}, so that a recorded step would not see the change; "
            "expected one in place: copy_, lerp_"
        )


@_check
def evaluations(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """The objective is evaluated as often as the trait says: in float32, float64, bfloat16, and without gradient."""
    stated = estimator.traits.evaluations(layer)
    wide, single, half = torch.float64, torch.float32, torch.bfloat16
    for dtype, gradient in ((wide, True), (wide, False), (single, True), (half, True)):
        loss = _Counted(small_objectives(layer)["smooth"])
        logits = small_logits(layer, batch=4).to(dtype).requires_grad_()
        with torch.set_grad_enabled(gradient):
            estimator(layer, logits, loss)
        where = f"in {dtype}" if gradient else "under no_grad"
        assert loss.count == stated, f"{loss.count} evaluations for each example {where}; the trait says {stated}"


class _Counted(Objective):
    """Counts the codes of an example. Unlike a function, it never shares an evaluation among examples."""

    def __init__(self, function: CodeLoss) -> None:
        self.function = function
        self.count = 0

    def __call__(self, codes: Tensor) -> Tensor:
        self.count += codes.shape[0]
        return self.function(codes)


@_check
def extreme_logits(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Logits of +-1e4 and logits that are all equal give a finite loss and finite gradients."""
    signs = small_logits(layer, batch=8).sign()
    for logits in (signs * 1e4, signs * 0, signs * 0 + 1e4):
        leaf = logits.float().requires_grad_()
        loss = estimator(
            layer, leaf, small_objectives(layer)["cross-entropy"], generator=Generator().manual_seed(0)
        ).loss
        own = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss.sum(), [leaf, *own], allow_unused=True)
        span = f"logits from {float(logits.min()):g} to {float(logits.max()):g}"
        assert loss.isfinite().all(), f"the loss is not finite for {span}"
        for gradient in gradients:
            assert gradient is None or gradient.isfinite().all(), f"a gradient is not finite for {span}"


# Randomness


@_check
def repeatable(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """With a generator given the result repeats, and the global generator's state does not move."""
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["smooth"]
    before = torch.get_rng_state()
    first, again = (_gradient(estimator, layer, logits, loss, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before), "the global generator's state moved"
    assert torch.equal(first, again), "the same generator gave another gradient"


@_check
def noise_differs_across_the_batch(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Examples with the same logits get different draws (64 of them; all alike by chance: less than one in 1e9)."""
    logits, loss = torch.zeros(64, *layer.shape, dtype=torch.float64), small_objectives(layer)["smooth"]
    draws = [_estimate(estimator, layer, logits, loss, seed=seed) for seed in (1, 2)]
    if torch.equal(draws[0].codes, draws[1].codes):
        raise NotApplicable("it draws nothing here: two generators gave the same codes")
    codes = draws[0].codes
    assert not torch.equal(codes, codes[:, :1].expand_as(codes)), "every example of the batch got the same draw"


@_check
def independent_examples(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """An example's gradient does not change with the other examples' logits and losses."""
    if not estimator.traits.independent_examples:
        raise NotApplicable("its traits say that examples share something")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["smooth"]
    others = torch.cat([logits[:1], small_logits(layer, batch=4, seed=1)])
    scales = torch.tensor([1.0, 10, -3, 0, 5], dtype=torch.float64)
    alone = _gradient(estimator, layer, logits, loss)[0]
    together = _gradient(estimator, layer, others, lambda codes: scales * loss(codes) + 7 * (scales - 1))[0]
    torch.testing.assert_close(together, alone, msg=lambda text: f"the first example's gradient changed: {text}")


# Values and gradients


@_check
def value(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """The mean of the loss's value is `E_q[f(z)]`, within 5 standard errors."""
    if not estimator.traits.value_is_unbiased(layer):
        raise NotApplicable("its traits say that the objective is evaluated at codes that are not drawn from q")
    needs_small_support(layer)
    logits, loss = small_logits(layer), small_objectives(layer)["smooth"]
    with torch.no_grad():
        values = estimator(layer, logits.expand(DRAWS, *layer.shape), loss, generator=Generator().manual_seed(0)).loss
    support = layer.enumerate(like=logits).unsqueeze(1)
    truth = (layer.log_prob(logits, support).exp() * loss(support)).sum()
    _compare(values.mean(0), values.std(0) / DRAWS**0.5, truth, "the value")


@_check
def decoder_gradient(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """The decoder's gradient is that of the value, and in the mean that of `E_q[f(z)]`.

    The objective is linear in the decoder's parameters, `<theta, z z^T>`: `<theta, gradient>` is the value again.
    """
    draws = 4000
    size = small_logits(layer).numel()
    theta = torch.randn(size, size, dtype=torch.float64, generator=Generator().manual_seed(3))
    theta = theta.expand(draws, size, size).clone().requires_grad_()  # a decoder for each draw

    def loss(codes: Tensor) -> Tensor:
        return torch.einsum("sbi,bij,sbj->sb", codes.flatten(2), theta, codes.flatten(2))

    logits = small_logits(layer).expand(draws, *layer.shape).clone().requires_grad_()
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), theta)
    torch.testing.assert_close(
        (theta.detach() * gradient).sum((1, 2)),
        estimate.loss.detach(),
        msg=lambda text: f"the decoder's gradient is not that of the loss's value: {text}",
    )
    if estimator.traits.value_is_unbiased(layer) and layer.support_size <= LARGEST_SUPPORT:
        support = layer.enumerate(like=logits)
        products = torch.einsum("ki,kj->kij", support.flatten(1), support.flatten(1))
        weights = layer.log_prob(logits[:1].detach(), support.unsqueeze(1)).exp()  # [K, 1]
        truth = (weights[..., None] * products).sum(0)
        _compare(gradient.mean(0), gradient.std(0) / draws**0.5, truth, "the decoder's gradient")


@_check
def unbiased(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """The mean gradient is that of enumeration, within 5 standard errors, on every objective."""
    if not estimator.traits.unbiased:
        raise NotApplicable("its traits say that it is biased")
    needs_small_support(layer)
    logits = small_logits(layer)
    for name, loss in small_objectives(layer).items():
        if name == "steps" and estimator.traits.differentiable_objective:
            continue
        learned = _after_some_steps(estimator, layer, loss)
        mean, error = monte_carlo_gradient(learned, layer, logits, loss, draws=DRAWS)
        _compare(mean, error, exact_gradient(layer, logits, loss)[0], f"latent {layer}, {name} objective: the gradient")


@_check
def baseline_has_not_seen_its_sample(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """A state carried from step to step has not seen the code it is used with.

    Two values have losses 0 and 1 and probabilities of one half. With a baseline near 1/2 a score-function estimate
    hardly varies: 2,500 steps of one example show a bias of one per cent. They are left out where gradients are equal
    in `.eval()`, whose state stands still. Then 300 steps are enough: what one example shares with its batch is large.
    """
    if not (estimator.traits.unbiased and estimator.state_dict().keys() - dict(estimator.named_parameters()).keys()):
        raise NotApplicable("it is biased, or carries nothing from step to step but what an optimizer changes")
    if layer.shape != (1, 2) or not layer.one_hot_rows:
        raise NotApplicable("the check is made for one binary variable")
    logits = torch.zeros(1, *layer.shape, dtype=torch.float64, requires_grad=True)

    def loss(codes: Tensor) -> Tensor:
        return codes[..., 0, 0]

    estimator = _after_some_steps(estimator, layer, loss, steps=300)
    frozen = copy.deepcopy(estimator).eval()
    frozen(layer, logits, loss, generator=Generator().manual_seed(0))
    unseen = all(torch.equal(tensor, frozen.state_dict()[name]) for name, tensor in estimator.state_dict().items())
    unseen = unseen and all(
        torch.equal(*(_gradient(one, layer, logits, loss, seed=seed) for one in (estimator, frozen)))
        for seed in range(25)
    )
    steps = 300 if unseen else 2500
    generator = Generator().manual_seed(0)
    gradients = torch.stack(
        [
            torch.autograd.grad(estimator(layer, logits, loss, generator=generator).loss.sum(), logits)[0][0]
            for _ in range(steps)
        ]
    )
    truth = exact_gradient(layer, logits, loss)[0]
    _compare(gradients.mean(0), gradients.std(0) / steps**0.5, truth, "with one example a step the gradient")


@_check
def limit(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """A biased estimator reaches its stated limit, to 5 standard errors and 3 % of the largest coordinate."""
    stated = estimator.traits.limit
    if stated is None:
        raise NotApplicable("it is unbiased" if estimator.traits.unbiased else "it is biased and states no limit")
    if stated.rows_only and not layer.one_hot_rows:
        raise NotApplicable("it states a limit for independent rows alone")
    needs_small_support(layer)
    names = {"linear": ["linear"], "quadratic": ["linear", "smooth"], "any": ["linear", "smooth", "cross-entropy"]}
    assert stated.exact_for in names, f"a limit for {stated.exact_for!r} objectives; expected one of {', '.join(names)}"
    allowed = list(names[stated.exact_for])
    if stated.exact_for == "any" and not estimator.traits.differentiable_objective:
        allowed += ["spiky", "steps"]
    for name, number in stated.at.items():
        estimator.hyperparameter(name, number)
    logits = small_logits(layer)
    for name in allowed:
        loss = small_objectives(layer)[name]
        mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=LIMIT_DRAWS, at_once=LIMIT_DRAWS // 2)
        truth = exact_gradient(layer, logits, loss)[0]
        values = ", ".join(f"{key}={number:g}" for key, number in stated.at.items()) or "its hyper-parameters"
        quantity = f"latent {layer}, {name} objective, {values}: the gradient"
        _compare(mean, error, truth, quantity, tolerance=0.03 * float(truth.abs().max()))


@_check
def forbidden_values_and_padding(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Forbidden values and padded sites get no evaluation and no gradient; an unbiased gradient stays unbiased."""
    draws = DRAWS // 10
    if layer.support_size > 8:
        raise NotApplicable(f"two sites of latent {layer} have more than 64 codes: a smaller one says the same")
    mask = torch.tensor([[True, True], [True, False]])
    allowed = torch.ones(2, 2, *layer.shape, dtype=torch.bool)
    if layer.one_hot_rows:
        allowed[0, 1, 0, -1] = False
    sites = restricted(layer, mask=mask)
    why_unsupported = estimator.traits.why_unsupported(Product(layer, 2))
    if why_unsupported is not None:
        raise NotApplicable(why_unsupported)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator.set_layer(sites)
    logits = small_logits(layer, batch=4).unflatten(0, (2, 2))
    smooth = small_objectives(sites)["smooth"]
    reachable = allowed & mask[(..., *[None] * len(layer.shape))]

    def loss(codes: Tensor) -> Tensor:
        copies = reachable.repeat(codes.shape[1] // 2, *[1] * (reachable.ndim - 1))
        assert not ((codes != 0) & ~copies).any(), "the objective was evaluated at a forbidden value, or at padding"
        return smooth(codes)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(draws, *[1] * (tensor.ndim - 1))

    leaf = repeated(logits).requires_grad_()
    estimate = estimator(
        layer, leaf, loss, mask=repeated(mask), allowed=repeated(allowed), generator=Generator().manual_seed(0)
    )
    gradients = torch.autograd.grad(estimate.loss.sum(), leaf)[0].unflatten(0, (draws, 2))
    assert gradients.isfinite().all(), "a gradient is not finite with forbidden values and padding"
    assert not gradients[:, ~reachable].any(), "a forbidden value, or padding, has a gradient"
    if estimator.traits.unbiased:
        truth = exact_gradient(layer, logits, smooth, mask=mask, allowed=allowed)
        error = gradients.std(0) / draws**0.5
        _compare(gradients.mean(0), error, truth, f"latent {layer}, with forbidden values and padding the gradient")


# Other ways to use it


@_check
def draw_now_learn_later(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """`draw`, then `draw.estimate(loss)`, gives what a call gives, and leaves the same state."""
    if not estimator.traits.one_pass:
        raise NotApplicable("its traits say that it evaluates more than the codes that it draws")
    loss = small_objectives(layer)["smooth"]
    for dtype in (torch.float64, torch.bfloat16):
        estimator = _after_some_steps(estimator, layer, loss)
        leaf = small_logits(layer, batch=4).to(dtype).requires_grad_()
        called, drew, acted = (copy.deepcopy(estimator) for _ in range(3))
        expected = called(layer, leaf, loss, generator=Generator().manual_seed(5))
        draw = drew.draw(layer, leaf, generator=Generator().manual_seed(5))
        assert draw.codes.dtype == dtype, f"codes in {draw.codes.dtype}; expected the dtype of the logits, {dtype}"
        with torch.no_grad():
            later, first = (acted.draw(layer, leaf, generator=Generator().manual_seed(5)) for _ in range(2))
        # Losses that come in between change no baseline.
        first.estimate(7 * loss(first.codes) + 7, logits=leaf)
        estimates = {
            "a draw": draw.estimate(loss(draw.codes)),
            "a draw without a graph": later.estimate(loss(later.codes), logits=leaf),
        }
        (truth,) = torch.autograd.grad(expected.loss.sum(), leaf)
        for name, estimate in estimates.items():
            (gradient,) = torch.autograd.grad(estimate.loss.sum(), leaf)
            torch.testing.assert_close(gradient, truth, msg=f"{name} has another gradient: {{}}".format)
            torch.testing.assert_close(estimate.loss, expected.loss)
        for name, tensor in called.state_dict().items():
            assert torch.equal(tensor, drew.state_dict()[name]), f"after a draw {name} is not what it is after a call"


@_check
def codes_with_a_gradient(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """The loss of `codes`, differentiated, gives what a call gives, for totals that are means and sums."""
    if not estimator.traits.pathwise:
        raise NotApplicable("its traits say that its gradient is not that of a code")
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["smooth"]
    expected = _gradient(estimator, layer, logits, loss, seed=5)
    for reduction in ("mean", "sum"):
        leaf = logits.clone().requires_grad_()
        codes = copy.deepcopy(estimator).codes(layer, leaf, reduction=reduction, generator=Generator().manual_seed(5))
        losses = loss(codes)
        total, scale = (losses.mean(), len(logits)) if reduction == "mean" else (losses.sum(), 1 / len(codes))
        (gradient,) = torch.autograd.grad(total, leaf)
        torch.testing.assert_close(
            scale * gradient, expected, msg=lambda text: f"codes give another gradient than a call: {text}"
        )


# State


@_check
def state(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """State dict, deep copy and pickle carry everything that the next gradient depends on."""
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["smooth"]
    fresh = copy.deepcopy(estimator)
    estimator = _after_some_steps(estimator, layer, loss)
    expected = _gradient(estimator, layer, logits, loss)
    fresh.load_state_dict(estimator.state_dict())
    copies = {
        "its state dict": fresh,
        "a deep copy": copy.deepcopy(estimator),
        "a pickle": pickle.loads(pickle.dumps(estimator)),
    }
    for name, replica in copies.items():
        assert torch.equal(_gradient(replica, layer, logits, loss), expected), f"{name} gives another gradient"


@_check
def frozen_in_eval(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """In `.eval()` no average moves."""
    logits, loss = small_logits(layer, batch=4).requires_grad_(), small_objectives(layer)["smooth"]
    estimator = _after_some_steps(estimator, layer, loss).eval()
    before = {name: buffer.clone() for name, buffer in estimator.named_buffers()}
    estimator(layer, logits, loss, generator=Generator().manual_seed(0)).loss.sum().backward()
    for name, buffer in estimator.named_buffers():
        assert torch.equal(buffer, before[name]), f"its buffer {name} moves; ask self.learning() before an update"


@_check
def learned_parts(estimator: GradientEstimator, layer: LatentLayer) -> None:
    """Every parameter of its own gets a finite gradient from the same backward pass."""
    named = dict(estimator.named_parameters())
    if not named:
        raise NotApplicable("it learns nothing")
    loss = small_objectives(layer)["smooth"]
    logits = small_logits(layer, batch=64).requires_grad_()
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    gradients = torch.autograd.grad(estimate.loss.sum(), list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        assert gradient is not None, f"parameter {name} gets no gradient"
        assert gradient.isfinite().all(), f"the gradient of parameter {name} is not finite"


# What the checks share


@dataclass
class _Deviation:
    """How far a mean is from the truth, in standard errors, at its worst coordinate."""

    mean: Tensor
    error: Tensor
    truth: Tensor
    tolerance: float
    excess: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.excess = (self.mean - self.truth).abs() - STANDARD_ERRORS * self.error - self.tolerance - ROUNDING

    def __str__(self) -> str:
        worst = int(self.excess.argmax())
        mean, error, truth = (float(tensor.flatten()[worst]) for tensor in (self.mean, self.error, self.truth))
        return f"coordinate {worst} is {mean:.5g} +- {error:.2g}, by enumeration {truth:.5g}"


def _compare(mean: Tensor, error: Tensor, truth: Tensor, quantity: str, *, tolerance: float = 0.0) -> None:
    deviation = _Deviation(mean, error, truth, tolerance)
    assert (deviation.excess <= 0).all(), f"{quantity} is off: {deviation}"


def _estimate(
    estimator: GradientEstimator, layer: LatentLayer, logits: Tensor, loss: CodeLoss, *, seed: int = 0
) -> Estimate:
    return copy.deepcopy(estimator)(layer, logits, loss, generator=Generator().manual_seed(seed))


def _gradient(
    estimator: GradientEstimator, layer: LatentLayer, logits: Tensor, loss: CodeLoss, *, seed: int = 0
) -> Tensor:
    """The gradient for the logits of one call of a copy: the estimator's state stays as it is."""
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_estimate(estimator, layer, leaf, loss, seed=seed).loss.sum(), leaf)
    return gradient


def _after_some_steps(
    estimator: GradientEstimator, layer: LatentLayer, loss: CodeLoss, *, steps: int = 5
) -> GradientEstimator:
    """A copy that has taken training steps: averages have moved, learned parts have learned."""
    estimator = copy.deepcopy(estimator)
    logits = small_logits(layer, batch=8, seed=1).requires_grad_()
    parameters = list(estimator.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    generator = Generator().manual_seed(11)
    for _ in range(steps):
        estimator.zero_grad()
        estimator(layer, logits, loss, generator=generator).loss.mean().backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return estimator
