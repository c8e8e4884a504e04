"""Every built-in estimator through the conformance kit, and tests that several estimators share.

The tests of one estimator are in the file of its name. `-k NAME` finds its cases here.

Statistical tests compare each coordinate's Monte-Carlo mean with the truth, within 5 standard errors. A normal mean
fails that once in 1.7 million coordinates. The kit makes some 10,000 such comparisons here. With fresh seeds that is
one false alarm in about 200 runs of this file. The seeds are fixed so that a failure can be repeated.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import BEYOND, QUADRATIC, AsOne, EveryCode, EveryNoise, estimate_and_gradient, gradient_of, with_layer
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad.testing import CHECKS, exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad.testing._checks import Check
from dgrad.testing._kit import Case, name_of
from dgrad_plugins.estimators import ESTIMATORS

# Every built-in estimator with its defaults, and with the hyper-parameters that make it another formula.
CASES: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in dgrad.estimators()),
    ("leg", {"samples": 3}),
    ("reinforce", {"baseline": "none"}),
    ("reinforce", {"samples": 2}),
    ("rloo", {"samples": 2}),
    ("direct", {"difference": "central", "samples": 3}),
    ("direct-rb", {"difference": "forward"}),
    ("arm", {"samples": 2}),
    ("disarm", {"samples": 2}),
    ("gumbel-softmax", {"alpha": 2.0}),
    ("st-gumbel-softmax", {"alpha": 1.5}),
    ("rodeo", {"surrogate": "network"}),
    *((name, {"sweep_share": 0.5}) for name in ("direct", "direct-rb", "leg")),
    *((name, {"sweep": "surrogate"}) for name in ("direct", "direct-rb", "leg")),
    *((name, {"sweep": "corrected", "sweep_share": 0.5}) for name in ("direct", "direct-rb", "leg")),
    ("double-cv", {"control": "quadratic"}),
]

SLOW = (
    *("unbiased", "limit", "baseline has not seen its sample", "value"),  # they draw many samples
    "forbidden values and padding",  # tests/core/test_sites.py has its share of the quick run
    *("state", "extreme logits", "asks the device nothing", "evaluations"),
)
"""Checks that the quick run leaves out."""


def _id(name: str, hyperparameters: dict[str, object]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in hyperparameters.items())])


@pytest.mark.parametrize(
    ("name", "hyperparameters", "check"),
    [
        pytest.param(
            *case,
            check,
            id=f"{_id(*case)}-{name_of(check)}",
            marks=[pytest.mark.slow] * bool(case[1] or name_of(check) in SLOW),
        )
        for case in CASES
        for check in CHECKS
    ],
)
def test_built_in_estimators_conform(name: str, hyperparameters: dict[str, object], check: Check) -> None:
    Case(check)(dgrad.estimator(name, **hyperparameters))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_tests_of_an_estimator_are_found_by_its_name(name: str) -> None:
    module = ESTIMATORS[name].__module__.rpartition("._")[2]
    assert name.startswith(module.replace("_", "-"))
    assert "\ndef test_" in Path(__file__).with_name(f"test_{module}.py").read_text(encoding="utf-8")


def test_hyperparameters_follow_their_schedule() -> None:
    estimator = dgrad.estimator("direct", epsilon="geometric:1:0.01")
    assert estimator.epsilon == 1.0
    estimator.set_run_length(100)
    estimator.set_step(50)
    assert float(estimator.epsilon) == pytest.approx(0.1)
    assert "epsilon=geometric:1:0.01:100" in repr(estimator)


# Exact cases

SUPPORTS = ["1x2", "1x5", "3x2", "2x4"]


def _mean_over_codes(estimator: GradientEstimator, spec: str, logits: Tensor, loss: CodeLoss) -> Tensor:
    """The exact mean gradient of an estimator whose only noise is its code."""
    n, k = map(int, spec.split("x"))
    layer = EveryCode(n, k)
    codes = layer.enumerate(like=logits).unsqueeze(1)
    weights = layer.log_prob(logits, codes).exp()  # [K, 1]
    gradients = gradient_of(estimator, layer, logits.expand(len(codes), -1, -1), loss)
    return (weights.unsqueeze(-1) * gradients).sum(0)


@pytest.mark.parametrize("spec", SUPPORTS)
@pytest.mark.parametrize(
    ("name", "objective", "exact"),
    [
        ("straight-through", "linear", True),
        ("straight-through", QUADRATIC, False),
        ("reinmax", "linear", True),
        ("reinmax", QUADRATIC, True),
        ("reinmax", BEYOND, False),
    ],
)
def test_exact_for_what_the_limit_says_and_for_no_more(name: str, objective: str, exact: bool, spec: str) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    estimator = dgrad.estimator(name)
    mean, truth = _mean_over_codes(estimator, spec, logits, loss), exact_gradient(layer, logits, loss)[0]
    assert ((mean - truth).norm() < 1e-9) == exact
    assert estimator.traits.limit.exact_for == {"straight-through": "linear", "reinmax": "quadratic"}[name]


@pytest.mark.parametrize("spec", ["1x2", "1x5", "3x2"])
@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("sum-and-sample", {"explicit": 7}),
        ("sum-and-sample", {"explicit": 1000, "baseline": "none"}),
        ("unordered-set", {"samples": 8}),
    ],
    ids=str,
)
def test_exact_where_the_evaluations_cover_the_support(
    name: str, hyperparameters: dict[str, object], spec: str
) -> None:
    layer = dgrad.latent(spec)
    estimator = dgrad.estimator(name, **hyperparameters)
    assert estimator.traits.evaluations(layer) == layer.support_size
    logits = small_logits(layer, batch=6, scale=2.0)
    for loss in small_objectives(layer).values():
        torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), exact_gradient(layer, logits, loss))


@pytest.mark.parametrize("name", ["sum-and-sample", "unordered-set"])
def test_a_constant_loss_has_no_gradient(name: str) -> None:
    """The baseline takes it away draw by draw, not only in the mean."""
    layer = dgrad.latent("4x5")
    logits = small_logits(layer, batch=8)
    gradient = gradient_of(dgrad.estimator(name), layer, logits, lambda codes: 7 + 0 * codes.sum((-2, -1)))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["arm", "disarm", "arms", "bitflip-1", "arsm"])
def test_certain_bits_are_certain(name: str) -> None:
    layer = dgrad.latent("3x2")
    logits = small_logits(layer, batch=500).sign().float() * 1e4
    logits[..., 0] = -logits[..., 1]
    estimate, gradient = estimate_and_gradient(
        dgrad.estimator(name), layer, logits, small_objectives(layer)["cross-entropy"]
    )
    assert torch.equal(estimate.codes, layer.argmax(logits).expand_as(estimate.codes))
    assert not gradient.any()


# The bias of small steps

SMALL_STEPS = {
    "st-gumbel-softmax": "temperature",
    "gumbel-softmax": "temperature",
    "imle": "strength",
    "direct-linear central": "epsilon",
    "direct-linear backward": "epsilon",
}


def _bias(case: str, objective: str, size: float) -> float:
    """The bias of the gradient for the second logit of 1x2, by 400,000 quantiles of the noise.

    Half as many change it by less than 1e-4.
    """
    layer = EveryNoise(1, 2)
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    name, *kind = case.split()
    estimator = dgrad.estimator(name, **{SMALL_STEPS[case]: size}, **({"difference": kind[0]} if kind else {}))
    mean = gradient_of(estimator, layer, logits.expand(400_000, 1, 2), loss).mean(0)
    return float((mean - exact_gradient(layer, logits, loss)[0])[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "objective", "vanishes"),
    [
        ("gumbel-softmax", QUADRATIC, True),
        ("gumbel-softmax", BEYOND, True),
        ("st-gumbel-softmax", QUADRATIC, True),
        ("imle", QUADRATIC, True),
        ("direct-linear central", QUADRATIC, True),
        ("direct-linear backward", "linear", True),
        ("direct-linear backward", QUADRATIC, False),
    ],
)
def test_the_bias_vanishes_where_the_limit_says(case: str, objective: str, vanishes: bool) -> None:
    """Extrapolated from two sizes it is 0: at ties these estimators follow the trapezoidal rule."""
    biases = [_bias(case, objective, size) for size in (0.04, 0.02, 0.01)]
    limit = 2 * biases[2] - biases[1]
    assert (abs(limit) < 2e-3) == vanishes, f"{biases} -> {limit}"
    if vanishes and objective != "linear":
        assert biases[1] / biases[2] == pytest.approx(2, rel=0.15), "O(tau)"


@pytest.mark.parametrize("name", ["st-gumbel-softmax", "imle", "direct-linear central"])
def test_beyond_quadratics_the_limit_is_the_trapezoidal_rule(name: str) -> None:
    """`p (1 - p) (h_0 + h_1) / 2 . (z_1 - z_0)`, the slopes those at the two codes."""
    layer = EveryNoise(1, 2)
    logits = small_logits(layer)

    def loss(codes: Tensor) -> Tensor:
        return (2 * codes[..., 0, 1]).exp()

    p = logits.softmax(-1)[0, 0, 0]
    slopes = 2.0 * torch.tensor([1.0, math.exp(2.0)], dtype=torch.float64)
    truth = exact_gradient(layer, logits, loss)[0, 0, 1]
    trapezoidal = p * (1 - p) * slopes.mean()
    estimator = dgrad.estimator(
        name.split()[0],
        **{SMALL_STEPS[name]: 1e-3},
        **({"difference": "central"} if " " in name else {}),
    )
    mean = gradient_of(estimator, layer, logits.expand(400_000, 1, 2), loss).mean(0)[0, 1]
    assert mean == pytest.approx(float(trapezoidal), rel=0.02)
    assert abs(trapezoidal - truth) > 0.1 * truth


# Learned parts

LEARNING = [
    ("reinforce", {"baseline": "input-dependent"}),
    ("rebar", {}),
    ("relax", {}),
    ("relax", {"with_loss": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cross-entropy", "spiky"])
@pytest.mark.parametrize("spec", ["1x5", "3x2"])
@pytest.mark.parametrize(("name", "hyperparameters"), LEARNING, ids=str)
def test_unbiased_whatever_the_learned_parts_are(
    name: str, hyperparameters: dict[str, object], spec: str, objective: str
) -> None:
    layer = dgrad.latent(spec)
    estimator = with_layer(name, layer, **hyperparameters)
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=20_000)
    truth = exact_gradient(layer, logits, loss)[0]
    assert ((mean - truth).abs() <= 5 * error + 1e-6).all(), f"{(mean - truth) / error}"


@pytest.mark.parametrize(("name", "hyperparameters"), [LEARNING[0], LEARNING[2]], ids=str)
def test_learned_parts_must_be_made_first(name: str, hyperparameters: dict[str, object]) -> None:
    layer = dgrad.latent("2x3")
    with pytest.raises(
        dgrad.InputError, match=rf"{name}.* learns something of the latent layer's size; expected .*set_layer"
    ):
        dgrad.estimator(name, **hyperparameters)(layer, torch.zeros(1, 2, 3), lambda codes: codes.sum((-2, -1)))


# Refusals


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("aimle", {"target": 0}, "target must stay above 0"),
        ("aimle", {"initial_strength": 0}, r"initial_strength must be a number in 0.0001 .. 10000; got 0"),
        ("dirct", {}, "did you mean 'direct'"),
        ("direct", {"epsilom": 1}, "unknown hyper-parameter of direct 'epsilom'; did you mean 'epsilon'"),
        ("direct", {"epsilon": 0}, "epsilon must stay above 0; got 0"),
        ("direct", {"epsilon": "-0.5"}, "epsilon must stay above 0"),
        ("direct", {"epsilon": "nan"}, "epsilon: cannot read 'nan'"),
        ("direct", {"epsilon": "linear:1:0"}, "epsilon must stay above 0"),
        ("direct", {"samples": "two"}, "samples: expected a whole number; got 'two'"),
        ("direct", {"samples": 0}, "samples must be a whole number of at least 1"),
        ("direct", {"difference": "sideways"}, "one of backward, forward, central"),
        ("direct", {"sweep_share": 0}, "sweep_share must be a number above 0, at most 1; got 0"),
        ("direct", {"sweep_share": 0.5, "sweep": "linear"}, "leave it out with sweep=linear"),
        ("direct", {"sweep": "quick"}, "sweep must be one of exact, surrogate, corrected, linear; got 'quick'"),
        ("direct-rb", {"sweep": "linear"}, "sweep must be one of exact, surrogate, corrected; got 'linear'"),
        (
            "leg",
            {"sweep": "surrogate", "sweep_share": 0.5},
            "leave it out with sweep=surrogate, or take sweep=corrected",
        ),
        ("leg", {"sweep": "corrected"}, "expected a sweep_share below 1, such as 0.1"),
        ("double-cv", {"control": "cubic"}, "control must be one of linear, quadratic; got 'cubic'"),
        ("direct-linear", {"sweep": "linear"}, "unknown hyper-parameter of direct-linear 'sweep'"),
        ("direct-rb", {"sweep_share": "half"}, "sweep_share: expected a number; got 'half'"),
        ("gapped-st", {"gap": 0}, "gap must stay above 0; got 0"),
        ("gapped-st", {"gap": "wide"}, "gap: cannot read 'wide' as a schedule; .*, or `expected`"),
        ("gumbel-softmax", {"temperature": "0"}, "temperature must stay above 0"),
        ("gumbel-softmax", {"alpha": 2.5}, "alpha must be a number from 1 to 2 .*; got 2.5"),
        ("imle", {"strength": 0}, "strength must stay above 0"),
        ("leg", {"sweep_share": "1.5"}, "sweep_share must be a number above 0, at most 1; got 1.5"),
        ("muprop", {"samples": 0}, "samples must be a whole number of at least 1; got 0"),
        ("perturbed", {"noise": "cauchy"}, "noise must be one of gumbel, normal; got 'cauchy'"),
        ("perturbed", {"samples": 1}, "samples must be a whole number of at least 2; got 1"),
        ("rao-st-gumbel-softmax", {"inner_samples": 0}, "inner_samples must be a whole number of at least 1"),
        ("arm", {"samples": 0}, "samples must be a whole number of at least 1; got 0"),
        ("rodeo", {"surrogate": "cubic"}, "surrogate must be one of quadratic, network; got 'cubic'"),
        ("rebar", {"temperature": 0}, "temperature must stay above 0"),
        ("reinforce", {"baseline": "magic"}, "one of none, moving-average, input-dependent; got 'magic'"),
        ("reinforce", {"hidden": 0}, "hidden must be a whole number of at least 1; got 0"),
        ("reinmax", {"temperature": 0}, "temperature must stay above 0"),
        ("relax", {"with_loss": "perhaps"}, "with_loss: expected true or false; got 'perhaps'"),
        ("rloo", {"samples": 1}, "at least 2; got 1: for one code an example take reinforce or relax"),
        ("straight-through", {"forward_temperature": 0}, "forward_temperature must stay above 0"),
        ("sum-and-sample", {"explicit": 0}, "explicit must be a whole number of at least 1; got 0"),
        ("sum-and-sample", {"baseline": "mean"}, "one of none, explicit-mean; got 'mean'"),
        ("unordered-set", {"samples": 1}, "samples must be a whole number of at least 2; got 1"),
        ("unordered-set", {"samples": 9}, "samples must be at most 8; got 9: for more take rloo"),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, hyperparameters: dict[str, object], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.estimator(name, **hyperparameters)


@pytest.mark.parametrize("name", ["arms", "double-cv", "rodeo"])
def test_a_single_sample_is_refused(name: str) -> None:
    with pytest.raises(dgrad.InputError, match="samples must be a whole number of at least 2; got 1"):
        dgrad.estimator(name, samples=1)


@pytest.mark.parametrize("name", ["exact", "direct-joint"])
def test_a_support_that_is_too_large_is_refused_with_its_size(name: str) -> None:
    layer = dgrad.latent("20x10")
    with pytest.raises(dgrad.InputError, match=r"20x10 has 1e\+20; expected at most 4096"):
        dgrad.estimator(name)(layer, torch.zeros(2, 20, 10), lambda codes: codes.sum((-2, -1)))


@pytest.mark.parametrize("name", ["arm", "disarm", "arms", "bitflip-1"])
def test_other_than_binary_variables_are_refused(name: str) -> None:
    layer = dgrad.latent("20x10")
    with pytest.raises(dgrad.InputError, match=f"{name} is for binary variables, such as 20x2; got 20x10"):
        dgrad.estimator(name)(layer, torch.zeros(2, 20, 10), lambda codes: codes.sum((-2, -1)))


ROWS = "needs a code of independent categorical rows"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("direct", "changes one variable of a code at a time"),
        ("gapped-st", ROWS),
        ("rao-st-gumbel-softmax", ROWS),
        ("reinmax", ROWS),
    ],
)
def test_estimators_of_single_rows_refuse_other_codes(name: str, reason: str) -> None:
    with pytest.raises(dgrad.InputError, match=f"{name} {reason}"):
        dgrad.estimator(name)(AsOne(2, 3), torch.zeros(4, 2, 3), lambda codes: codes.sum((-2, -1)))


@pytest.mark.parametrize("name", ["aimle", "direct-linear", "imle", "perturbed", "straight-through"])
def test_others_need_no_rows(name: str) -> None:
    layer = AsOne(2, 3)
    logits, loss = small_logits(layer, batch=64), small_objectives(layer)[BEYOND]
    assert gradient_of(dgrad.estimator(name), layer, logits, loss).any()
