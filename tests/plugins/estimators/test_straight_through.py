"""Relaxations, straight-through estimators and perturb-and-MAP: their formulas by hand, and where their bias vanishes.

Most tests need no statistics: `EveryCode` hands an estimator the whole support, one code for each example of the batch, so that weights
`q(z)` make its exact mean; `EveryNoise` hands it evenly spaced quantiles of the noise. Where draws are random, means agree within 5 standard
errors (one false alarm in 1.7 million coordinates). What every estimator must do is in the conformance kit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._conditional import conditional_potentials
from dgrad_plugins.latents import Categorical

SUPPORTS = ["1x2", "1x5", "3x2", "2x4"]
QUADRATIC, BEYOND = "smooth", "cross-entropy"


class EveryCode(Categorical):
    """Its one sample holds each code of the support once, along the batch."""

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return self.enumerate(like=logits).unsqueeze(0)


class EveryNoise(Categorical):
    """Two values, whose noise takes evenly spaced quantiles along the batch."""

    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        levels = (torch.arange(len(logits), dtype=logits.dtype) + 0.5) / len(logits)
        # The difference of two Gumbel variables is logistic.
        return torch.stack([torch.zeros_like(levels), levels.logit()], dim=-1)[None, :, None]


def _gradient(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, seed: int = 0
) -> Tensor:
    leaf = logits.detach().requires_grad_()
    estimate = estimator(layer, leaf, loss, generator=Generator().manual_seed(seed))
    return torch.autograd.grad(estimate.loss.sum(), leaf)[0]


def _mean_over_codes(estimator: GradientEstimator, spec: str, logits: Tensor, loss: CodeLoss) -> Tensor:
    """The exact mean gradient of an estimator whose only noise is its code."""
    n, k = map(int, spec.split("x"))
    layer = EveryCode(n, k)
    codes = layer.enumerate(like=logits).unsqueeze(1)
    weights = layer.log_prob(logits, codes).exp()  # [K, 1]
    gradients = _gradient(estimator, layer, logits.expand(len(codes), -1, -1), loss)
    return (weights.unsqueeze(-1) * gradients).sum(0)


def _slope(loss: CodeLoss, codes: Tensor) -> Tensor:
    leaf = codes.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def _jacobian(q: Tensor) -> Tensor:
    return torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2)


def _times(jacobian: Tensor, slope: Tensor) -> Tensor:
    return (jacobian @ slope.unsqueeze(-1)).squeeze(-1)


# Straight-through


def test_straight_through_is_the_jacobian_times_the_slope_at_the_code() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    estimator = dgrad.estimator("straight-through", temperature=0.5, samples=3)
    codes = layer.sample(logits, 3, generator=Generator().manual_seed(0))
    expected = (_times(_jacobian((logits / 0.5).softmax(-1)), _slope(loss, codes)) / 0.5).mean(0)
    torch.testing.assert_close(_gradient(estimator, layer, logits, loss), expected)


def test_the_forward_temperature_changes_the_code_alone() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    estimator = dgrad.estimator("straight-through", forward_temperature=0.25)
    assert not estimator.traits.unbiased_value
    assert not dgrad.estimator("straight-through", forward_temperature="linear:1:0.5").traits.unbiased_value
    assert dgrad.estimator("straight-through", forward_temperature="1").traits.unbiased_value
    codes = layer.sample(logits / 0.25, generator=Generator().manual_seed(0))
    assert torch.equal(estimator(layer, logits, loss, generator=Generator().manual_seed(0)).codes, codes)
    expected = _times(_jacobian(logits.softmax(-1)), _slope(loss, codes))[0]
    torch.testing.assert_close(_gradient(estimator, layer, logits, loss), expected)


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


def test_reinmax_by_hand_at_another_temperature() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    codes = layer.sample(logits, generator=Generator().manual_seed(0))
    middle = ((logits / 1.5).softmax(-1) + codes) / 2
    jacobian = 2 * _jacobian(middle) - _jacobian(logits.softmax(-1)) / 2
    gradient = _gradient(dgrad.estimator("reinmax", temperature=1.5), layer, logits, loss)
    torch.testing.assert_close(gradient, _times(jacobian, _slope(loss, codes))[0])


# Gapped straight-through


@pytest.mark.parametrize("gap", [1.0, 0.3, "expected"])
def test_gapped_st_moves_the_logits_until_the_code_leads_by_the_gap(gap: float | str) -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=50)
    codes = layer.sample(logits, generator=Generator().manual_seed(0))[0]
    moved = torch.empty_like(logits)
    for b in range(50):
        for i in range(2):
            phi, z = logits[b, i], int(codes[b, i].argmax())
            p = phi.softmax(-1)[z]
            size = float(-(1 - p).log() / p) if gap == "expected" else float(torch.tensor(gap))
            for j in range(4):
                moved[b, i, j] = phi.max() if j == z else phi[j] - max(0.0, float(phi[j] - phi.max()) + size)
            others = torch.cat([moved[b, i, :z], moved[b, i, z + 1 :]])
            assert moved[b, i, z] - others.max() >= size - 1e-9
    expected = _times(_jacobian((moved / 0.5).softmax(-1)), _slope(loss, codes.unsqueeze(0))[0]) / 0.5
    estimator = dgrad.estimator("gapped-st", temperature=0.5, gap=gap)
    torch.testing.assert_close(_gradient(estimator, layer, logits, loss), expected)


def test_the_expected_gap_is_the_mean_lead_of_the_code() -> None:
    """`-log(1 - p_z) / p_z` against draws of the perturbed logits given the code."""
    log_p = torch.tensor([[[0.6, 0.3, 0.1]]], dtype=torch.float64).log()
    for z, p in enumerate((0.6, 0.3, 0.1)):
        codes = torch.eye(3, dtype=torch.float64)[z].view(1, 1, 1, 3)
        potentials = conditional_potentials(log_p, codes, 100_000, generator=Generator().manual_seed(0)).flatten(0, 3)
        lead = potentials[:, z] - torch.cat([potentials[:, :z], potentials[:, z + 1 :]], dim=1).amax(1)
        assert abs(float(lead.mean()) + math.log(1 - p) / p) < 5 * float(lead.std()) / 100_000**0.5


def test_the_expected_gap_is_finite_at_its_ends() -> None:
    """A code that is all but certain (gap without bound) and codes of probability 0 (gap 1), in float32."""
    layer = EveryCode(1, 2)
    logits = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]])
    gradient = _gradient(dgrad.estimator("gapped-st", gap="expected"), layer, logits, lambda codes: codes[..., 0, 1])
    assert gradient.isfinite().all()
    assert gradient[0].norm() == 0, "certain: its gap of 200 leaves no gradient"
    assert gradient[1, 0, 1] == pytest.approx(math.e / (1 + math.e) ** 2), "the other code leads by a gap of 1"


# Gumbel-softmax, its straight-through form and its Rao-Blackwellisation


def test_rao_has_the_mean_of_st_gumbel_softmax_and_less_variance() -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    plain = monte_carlo_gradient(dgrad.estimator("st-gumbel-softmax"), layer, logits, loss, draws=100_000)
    errors = [plain[1]]
    for inner in (1, 5, 50):
        estimator = dgrad.estimator("rao-st-gumbel-softmax", inner_samples=inner)
        mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=10_000 if inner == 50 else 100_000)
        assert ((mean - plain[0]).abs() <= 5 * (error.square() + plain[1].square()).sqrt()).all()
        errors.append(error * (10_000 / 100_000) ** 0.5 if inner == 50 else error)
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=0)
    assert (errors[2] < errors[1]).all()
    assert (errors[3] < errors[2]).all()


def test_rao_holds_the_conditional_noise_fixed() -> None:
    layer, loss = dgrad.latent("2x3"), small_objectives(dgrad.latent("2x3"))[BEYOND]
    logits = small_logits(layer, batch=4)
    generator = Generator().manual_seed(0)
    codes = layer.sample(logits, generator=generator)
    potentials = conditional_potentials(logits.log_softmax(-1), codes, 7, generator=generator)
    jacobian = _jacobian((potentials / 0.5).softmax(-1)).mean(0) / 0.5
    estimator = dgrad.estimator("rao-st-gumbel-softmax", temperature=0.5, inner_samples=7)
    expected = _times(jacobian, _slope(loss, codes))[0]
    torch.testing.assert_close(_gradient(estimator, layer, logits, loss), expected)


SMALL_STEPS = {
    "st-gumbel-softmax": "temperature",
    "gumbel-softmax": "temperature",
    "imle": "strength",
    "direct-linear central": "epsilon",
    "direct-linear backward": "epsilon",
}


def _bias(case: str, objective: str, size: float) -> float:
    """The bias of the gradient for the second logit of 1x2, by 400,000 quantiles of the noise; halving errors of it are below 1e-4."""
    layer = EveryNoise(1, 2)
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    name, *kind = case.split()
    estimator = dgrad.estimator(name, **{SMALL_STEPS[case]: size}, **({"difference": kind[0]} if kind else {}))
    mean = _gradient(estimator, layer, logits.expand(400_000, 1, 2), loss).mean(0)
    return float((mean - exact_gradient(layer, logits, loss)[0])[0, 1])


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
    """Extrapolated from two sizes it is 0: what straight-through Gumbel-softmax and I-MLE do at ties is the trapezoidal rule."""
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
    mean = _gradient(estimator, layer, logits.expand(400_000, 1, 2), loss).mean(0)[0, 1]
    assert mean == pytest.approx(float(trapezoidal), rel=0.02)
    assert abs(trapezoidal - truth) > 0.1 * truth


# Direct with a linear sweep, and I-MLE


@pytest.mark.parametrize("difference", ["backward", "forward", "central"])
def test_direct_linear_is_direct_for_a_linear_objective(difference: str) -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=100), small_objectives(layer)["linear"]
    given = {"epsilon": 0.5, "samples": 2, "difference": difference}
    exact = _gradient(dgrad.estimator("direct", **given), layer, logits, loss)
    assert exact.any()
    assert torch.equal(_gradient(dgrad.estimator("direct-linear", **given), layer, logits, loss), exact)
    assert torch.equal(_gradient(dgrad.estimator("direct", sweep="linear", **given), layer, logits, loss), exact)


def test_direct_linear_adds_the_first_order_expansion() -> None:
    """`T[i, j] = f(z) + h_i . (onehot(j) - z_i)`, written out, in the place of the sweep."""
    layer, loss = dgrad.latent("3x4"), small_objectives(dgrad.latent("3x4"))[BEYOND]
    logits = small_logits(layer, batch=100)
    potentials = logits + layer.noise(logits, generator=Generator().manual_seed(0))
    codes = layer.argmax(potentials)
    sweep = loss(codes)[..., None, None] + layer.linear_sweep(_slope(loss, codes), codes)
    expected = (codes - layer.argmax(potentials - 0.5 * sweep))[0] / 0.5
    torch.testing.assert_close(_gradient(dgrad.estimator("direct-linear", epsilon=0.5), layer, logits, loss), expected)


def test_the_traits_of_direct_follow_its_sweep() -> None:
    layer = dgrad.latent("3x4")
    exact, linear = dgrad.estimator("direct", samples=2).traits, dgrad.estimator("direct-linear", samples=2).traits
    assert (exact.evaluations(layer), linear.evaluations(layer)) == (2 * (3 * 3 + 1), 2)
    assert (exact.differentiable_objective, linear.differentiable_objective) == (False, True)
    assert (exact.limit.exact_for, linear.limit.exact_for) == ("any", "linear")
    assert dgrad.estimator("direct-linear", difference="central").traits.limit.exact_for == "quadratic"


def test_imle_is_the_central_difference_of_direct_linear() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=100), small_objectives(layer)[BEYOND]
    imle = _gradient(dgrad.estimator("imle", strength=0.3, samples=2), layer, logits, loss)
    linear = dgrad.estimator("direct-linear", epsilon=0.3, samples=2, difference="central")
    assert imle.any()
    assert torch.equal(imle, _gradient(linear, layer, logits, loss))


# Adaptive I-MLE


def test_aimle_by_hand_and_its_strength_moves_after_use() -> None:
    layer, loss = dgrad.latent("2x3"), small_objectives(dgrad.latent("2x3"))[BEYOND]
    logits = small_logits(layer, batch=20)
    estimator = dgrad.estimator("aimle", target=0.3, rate=0.2, initial_strength=0.5)
    potentials = logits + layer.noise(logits, generator=Generator().manual_seed(0))
    slope = _slope(loss, layer.argmax(potentials))
    lam = 0.5 * potentials.flatten(2).norm(dim=-1) / slope.flatten(2).norm(dim=-1)  # [1, B]
    lam = lam[..., None, None]
    change = layer.argmax(potentials + lam * slope) - layer.argmax(potentials - lam * slope)
    torch.testing.assert_close(_gradient(estimator, layer, logits, loss), (change / (2 * lam))[0])
    share = float((change != 0).any(-1).double().mean())
    assert 0 < share < 1
    assert float(estimator.strength) == pytest.approx(0.5 * math.exp(0.2 * (0.3 - share)))
    assert torch.equal(estimator.state_dict()["strength"], estimator.strength)


@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_aimle_reaches_its_target_at_any_scale_of_the_loss(target: float, scale: float) -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer, batch=200), small_objectives(layer)[BEYOND]
    estimator = dgrad.estimator("aimle", target=target, rate=0.5)
    shares = []
    for step in range(60):
        gradient = _gradient(estimator, layer, logits, lambda codes: scale * loss(codes), seed=step)
        shares.append(float((gradient != 0).any(-1).double().mean()))
    assert sum(shares[30:]) / 30 == pytest.approx(target, abs=0.03)


def test_aimle_stays_finite_without_a_slope_and_without_logits() -> None:
    layer, estimator = dgrad.latent("2x3"), dgrad.estimator("aimle", rate=10.0)
    logits = torch.zeros(64, 2, 3)
    for _ in range(20):
        assert not _gradient(estimator, layer, logits, lambda codes: 0 * codes.sum((-2, -1))).any()
    assert estimator.strength == 1e4, "where no strength brings a gradient it stops at the end of its range"
    gradient = _gradient(dgrad.estimator("aimle"), layer, logits, lambda codes: codes[..., 0].sum(-1))
    assert gradient.isfinite().all()
    assert gradient.any(), "equal logits get a gradient"


# Perturbed optimizers


class AsOne(Categorical):
    """The same codes without the knowledge that their rows are independent."""

    @property
    def independent_rows(self) -> bool:
        return False


def _mean_slope(codes: Tensor, weights: Tensor, loss: CodeLoss) -> Tensor:
    return (weights.view(-1, 1, 1) * _slope(loss, codes.unsqueeze(1))[:, 0]).sum(0)


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("family", [Categorical, AsOne])
def test_perturbed_with_gumbel_noise_has_the_mean_of_straight_through(family: type[Categorical], samples: int) -> None:
    layer = family(2, 3)
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    codes = layer.enumerate(like=logits)
    slope = _mean_slope(codes, layer.log_prob(logits, codes.unsqueeze(1)).exp(), loss)
    mean, error = monte_carlo_gradient(dgrad.estimator("perturbed", samples=samples), layer, logits, loss, draws=40_000)
    expected = _times(_jacobian(logits[0].softmax(-1)), slope)
    assert ((mean - expected).abs() <= 5 * error).all()


def test_perturbed_uses_that_rows_are_independent() -> None:
    errors = []
    for family in (Categorical, AsOne):
        layer = family(4, 3)
        logits, loss = small_logits(layer), small_objectives(layer)["linear"]
        errors.append(monte_carlo_gradient(dgrad.estimator("perturbed"), layer, logits, loss, draws=20_000)[1])
    assert errors[0].square().sum() < 0.5 * errors[1].square().sum()


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_perturbed_with_normal_noise_differentiates_the_perturbed_mean(sigma: float) -> None:
    """Two values: `P(z_1) = Phi(d / (sigma sqrt 2))`, `d` the difference of the logits."""
    layer = dgrad.latent("1x2")
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    estimator = dgrad.estimator("perturbed", sigma=sigma, noise="normal", samples=3)
    assert not estimator.traits.unbiased_value
    scaled = (logits[0, 0, 1] - logits[0, 0, 0]) / (sigma * 2**0.5)
    p = torch.distributions.Normal(0.0, 1.0).cdf(scaled)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(scaled).exp() / (sigma * 2**0.5)
    slope = _mean_slope(torch.eye(2, dtype=torch.float64).unsqueeze(1), torch.stack([1 - p, p]), loss)[0]
    expected = density * (slope[1] - slope[0])
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=100_000)
    assert abs(mean[0, 1] - expected) <= 5 * error[0, 1]
    assert abs(mean[0, 0] + expected) <= 5 * error[0, 0]


def test_the_value_of_perturbed_is_unbiased_with_gumbel_noise_of_scale_1() -> None:
    assert dgrad.estimator("perturbed").traits.unbiased_value
    assert not dgrad.estimator("perturbed", sigma=0.5).traits.unbiased_value
    assert not dgrad.estimator("perturbed", sigma="linear:1:0.5").traits.unbiased_value


# Bad input


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("aimle", {"target": 0}, "target must stay above 0"),
        ("aimle", {"initial_strength": 0}, r"initial_strength must lie in 0.0001 .. 10000; got 0"),
        ("direct", {"sweep": "quick"}, "sweep must be one of exact, linear; got 'quick'"),
        ("direct-linear", {"sweep": "linear"}, "unknown hyper-parameter of direct-linear 'sweep'"),
        ("gapped-st", {"gap": 0}, "gap must stay above 0; got 0"),
        ("gapped-st", {"gap": "wide"}, "gap: cannot read 'wide' as a schedule; .*, or `expected`"),
        ("imle", {"strength": 0}, "strength must stay above 0"),
        ("perturbed", {"noise": "cauchy"}, "noise must be one of gumbel, normal; got 'cauchy'"),
        ("perturbed", {"samples": 1}, "samples must be a whole number of at least 2; got 1"),
        ("rao-st-gumbel-softmax", {"inner_samples": 0}, "inner_samples must be a whole number of at least 1"),
        ("reinmax", {"temperature": 0}, "temperature must stay above 0"),
        ("straight-through", {"forward_temperature": 0}, "forward_temperature must stay above 0"),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, hyperparameters: dict[str, object], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.estimator(name, **hyperparameters)


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
    assert _gradient(dgrad.estimator(name), layer, logits, loss).any()
