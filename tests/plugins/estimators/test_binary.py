"""The estimators of antithetic and swapped samples, and those with control variates from the slope: what is special to each.

That each is unbiased, finite, repeatable and so on is tested for all estimators in `test_estimators.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import Estimate, GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad.core.random import gumbel
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._arms import inverse_decorrelation
from dgrad_plugins.estimators._binary import log_odds
from dgrad_plugins.estimators._coefficients import Coefficients
from dgrad_plugins.estimators._rodeo import Rodeo, _surrogates


def _call(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, seed: int = 0
) -> tuple[Estimate, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    estimate = estimator(layer, leaf, loss, generator=Generator().manual_seed(seed))
    return estimate, torch.autograd.grad(estimate.loss.sum(), leaf)[0]


def _variance(estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss) -> float:
    draws = 10_000
    return float(monte_carlo_gradient(estimator, layer, logits, loss, draws=draws)[1].square().sum() * draws)


# Antithetic samples


def test_arm_is_the_formula_on_its_uniform_numbers() -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer, batch=50), small_objectives(layer)["cross-entropy"]
    estimate, gradient = _call(dgrad.estimator("arm"), layer, logits, loss)
    phi = logits[..., 1] - logits[..., 0]
    uniform = torch.rand(50, 3, dtype=torch.float64, generator=Generator().manual_seed(0))
    up, down = (uniform > (-phi).sigmoid()).double(), (uniform < phi.sigmoid()).double()
    torch.testing.assert_close(estimate.codes[..., 1], torch.stack([up, down]))
    losses = loss(torch.stack([1 - estimate.codes[..., 1], estimate.codes[..., 1]], -1))
    torch.testing.assert_close(gradient[..., 1], (losses[0] - losses[1])[:, None] * (uniform - 0.5))
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1])
    torch.testing.assert_close(estimate.loss, losses.mean(0))


def test_disarm_is_the_mean_of_arm_given_its_codes() -> None:
    """One variable; a fine grid of uniform numbers, the mean over those that give different codes."""
    layer, grid = dgrad.latent("1x2"), 100_000
    for phi in (-2.0, -0.1, 0.0, 1.5):
        uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        bits = uniform > torch.tensor(-phi).sigmoid(), uniform < torch.tensor(phi).sigmoid()
        arm = ((bits[0].double() - bits[1].double()) * (uniform - 0.5))[bits[0] != bits[1]]
        logits = torch.tensor([[[0.0, phi]]], dtype=torch.float64).expand(200, -1, -1)
        estimate, gradient = _call(dgrad.estimator("disarm"), layer, logits, lambda codes: codes[..., 0, 1])
        differ = estimate.codes[0, :, 0, 1] != estimate.codes[1, :, 0, 1]
        assert differ.any()
        assert not gradient[~differ].any()
        torch.testing.assert_close(gradient[differ, 0, 1], arm.mean().expand(int(differ.sum())), rtol=1e-3, atol=1e-4)


def test_arms_with_two_samples_is_disarm() -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer).expand(2000, -1, -1), small_objectives(layer)["spiky"]
    phi = logits[..., 1] - logits[..., 0]
    for name in ("disarm", "arms"):
        estimator = dgrad.estimator(name, **({"samples": 2} if name == "arms" else {}))
        estimate, gradient = _call(estimator, layer, logits, loss)
        (first, second), losses = estimate.codes[..., 1], loss(estimate.codes)
        expected = 0.5 * (losses[0] - losses[1])[:, None] * (first - second) * phi.abs().sigmoid()
        torch.testing.assert_close(gradient[..., 1], expected)
        # As often different as can be: with probability 2 min(p, 1 - p)
        often = 2 * (-phi[0].abs()).sigmoid()
        differ = (estimate.codes[0, ..., 1] != estimate.codes[1, ..., 1]).double()
        assert ((differ.mean(0) - often).abs() <= 5 * (often * (1 - often) / 2000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("samples", [2, 3, 4, 9])
def test_the_correlation_of_arms_is_the_stated_one(samples: int) -> None:
    """Against the textbook form where that is accurate; against the empirical frequencies; and with 2 samples against sig(|phi|)."""
    phi = torch.linspace(-6, 6, 25, dtype=torch.float64)
    p = phi.sigmoid()
    both = 2 * p - 1 + (2 * (1 - p) ** (1 / (samples - 1)) - 1).clamp_min(0) ** (samples - 1)
    torch.testing.assert_close(inverse_decorrelation(phi, samples), p * (1 - p) / (p - both))
    if samples == 2:
        torch.testing.assert_close(inverse_decorrelation(phi, samples), phi.abs().sigmoid())

    layer, draws = dgrad.latent("25x2"), 20_000
    logits = torch.stack([torch.zeros_like(phi), phi], -1).expand(draws, 25, 2)
    with torch.no_grad():
        codes = dgrad.estimator("arms", samples=samples)(
            layer, logits, lambda codes: codes[..., 0, 0], generator=Generator().manual_seed(0)
        ).codes
    for frequency, truth in ((codes[-1, ..., 1], p), (codes[0, ..., 1] * codes[-1, ..., 1], both)):
        error = (truth * (1 - truth) / draws).clamp_min(0).sqrt()
        assert ((frequency.mean(0) - truth).abs() <= 5 * error + 1e-3).all()


def test_the_correlation_of_arms_is_accurate_in_float32_at_any_odds() -> None:
    phi = torch.cat([torch.linspace(-60, 60, 241), torch.tensor([-1e4, -200.0, -100.0, 100.0, 200.0, 1e4])])
    for samples in (2, 4, 50):
        single = inverse_decorrelation(phi, samples)
        torch.testing.assert_close(single.double(), inverse_decorrelation(phi.double(), samples), rtol=2e-5, atol=0)
        assert single[-6] == 1, "rare bits are uncorrelated"
        assert single[-1] == 1, "and so are rare zeros: p - P11 = 1 - p"


@pytest.mark.parametrize("name", ["arm", "disarm", "arms", "bitflip-1", "arsm"])
def test_certain_bits_are_certain(name: str) -> None:
    layer = dgrad.latent("3x2")
    logits = small_logits(layer, batch=500).sign().float() * 1e4
    logits[..., 0] = -logits[..., 1]
    estimate, gradient = _call(dgrad.estimator(name), layer, logits, small_objectives(layer)["cross-entropy"])
    assert torch.equal(estimate.codes, layer.argmax(logits).expand_as(estimate.codes))
    assert not gradient.any()


def test_antithetic_samples_vary_less_than_independent_ones_at_equal_evaluations() -> None:
    layer = dgrad.latent("10x2")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]

    def variance(name: str, **hyperparameters: object) -> float:
        return _variance(dgrad.estimator(name, **hyperparameters), layer, logits, loss)

    disarm, arms = variance("disarm"), variance("arms", samples=4)
    assert disarm < variance("arm")
    assert disarm < variance("rloo", samples=2)
    assert arms < variance("rloo", samples=4)


# Swaps and flips


@pytest.mark.parametrize("spec", ["1x2", "2x3", "3x4"])
def test_arsm_is_the_formula_written_out(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = dgrad.latent(spec), 6
    k = layer.shape[-1]
    logits, loss = small_logits(layer, batch=batch), small_objectives(layer)["smooth"]
    pi = (-gumbel(logits, generator=Generator().manual_seed(3))[0]).softmax(-1)
    losses = torch.zeros(batch, k, k, dtype=torch.float64)
    for c, j in itertools.product(range(k), range(k)):
        swapped = pi.clone()
        swapped[..., c], swapped[..., j] = pi[..., j], pi[..., c]
        codes = torch.eye(k, dtype=torch.float64)[(swapped * (-logits).exp()).argmin(-1)]
        losses[:, c, j] = loss(codes[None])[0]
    expected = torch.zeros_like(logits)
    for c, j in itertools.product(range(k), range(k)):
        expected[..., c] += (losses[:, c, j] - losses[:, :, j].mean(1))[:, None] * (1 / k - pi[..., j])
    for codes_per_call in (1, 16384):
        monkeypatch.setattr("dgrad_plugins.estimators._arsm.CODES_PER_CALL", codes_per_call)
        estimate, gradient = _call(dgrad.estimator("arsm"), layer, logits, loss, seed=3)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(estimate.loss, losses[:, 0, 0])


@pytest.mark.parametrize(("spec", "evaluations"), [("1x2", 2), ("20x2", 2), ("3x3", 4), ("7x10", 46)])
def test_arsm_counts_its_evaluations_by_the_values_alone(spec: str, evaluations: int) -> None:
    assert dgrad.estimator("arsm").traits.evaluations(dgrad.latent(spec)) == evaluations


def test_bitflip_is_exact_with_one_variable_and_touches_one_of_several() -> None:
    layer = dgrad.latent("1x2")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["spiky"]
    estimate, gradient = _call(dgrad.estimator("bitflip-1"), layer, logits, loss)
    torch.testing.assert_close(gradient, exact_gradient(layer, logits, loss))
    support = layer.enumerate(like=logits).unsqueeze(1).expand(-1, 5, -1, -1)
    torch.testing.assert_close(estimate.loss, (layer.log_prob(logits, support).exp() * loss(support)).sum(0))

    layer, draws = dgrad.latent("4x2"), 8000
    logits = small_logits(layer).expand(draws, -1, -1)
    _, gradient = _call(dgrad.estimator("bitflip-1"), layer, logits, lambda codes: codes[..., 1].sum(-1))
    touched = gradient[..., 1] != 0
    assert (touched.sum(-1) == 1).all()
    assert ((touched.double().mean(0) - 0.25).abs() < 5 * (0.25 * 0.75 / draws) ** 0.5).all()


# Control variates from the slope


@pytest.mark.parametrize("spec", ["3x2", "2x4"])
@pytest.mark.parametrize("name", ["double-cv", "rodeo"])
@pytest.mark.parametrize("samples", [2, 4])
def test_the_gradient_of_a_linear_objective_is_exact_at_the_first_step(name: str, spec: str, samples: int) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["linear"]
    _, gradient = _call(dgrad.estimator(name, samples=samples), layer, logits, loss)
    torch.testing.assert_close(gradient, exact_gradient(layer, logits, loss))


def test_rodeo_without_its_quadratic_term_is_double_cv() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["cross-entropy"]
    gradients = [_call(dgrad.estimator(name), layer, logits, loss)[1] for name in ("rodeo", "double-cv")]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("spec", ["3x2", "2x4"])
def test_the_stein_operator_and_the_local_expectation_of_the_surrogates_written_out(spec: str) -> None:
    layer, samples = dgrad.latent(spec), 3
    n, k = layer.shape
    logits = small_logits(layer)
    p, codes = layer.mean(logits), layer.sample(logits, samples, generator=Generator().manual_seed(0))
    slope = torch.randn(codes.shape, dtype=torch.float64, generator=Generator().manual_seed(1))
    for power, (stein, local) in enumerate(_surrogates(p, codes, slope), start=1):
        for m in range(samples):

            def surrogate(y: Tensor, m: int = m, power: int = power) -> Tensor:
                others = [other for other in range(samples) if other != m]
                terms = [(slope[other, 0] * (y - codes[other, 0])).sum() ** power for other in others]
                return torch.stack(terms).mean()

            z = codes[m, 0]
            expected_stein, expected_local = (
                torch.zeros((), dtype=torch.float64),
                torch.zeros(n, k, dtype=torch.float64),
            )
            for i in range(n):
                values = []
                for j in range(k):
                    changed = z.clone()
                    changed[i] = torch.eye(k, dtype=torch.float64)[j]
                    values.append(surrogate(changed))
                mean = (p[0, i] * torch.stack(values)).sum()
                expected_stein += mean - surrogate(z)
                expected_local[i] = p[0, i] * (torch.stack(values) - mean)
            torch.testing.assert_close(stein[m, 0], expected_stein)
            torch.testing.assert_close(local[m, 0], expected_local)


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("spec", ["3x2", "2x4"])
def test_rodeo_is_unbiased_with_any_coefficients(spec: str, samples: int) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer), small_objectives(layer)["smooth"]
    truth = exact_gradient(layer, logits, loss)[0]
    estimator = Rodeo(samples)
    estimator.coefficients.start = [0.3, -0.5]
    # one batch, so that nothing is learned in between
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=40_000)
    assert ((mean - truth).abs() <= 5 * error).all()


def _trained(name: str, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss) -> GradientEstimator:
    estimator, generator = dgrad.estimator(name), Generator().manual_seed(11)
    with torch.no_grad():
        for _ in range(30):
            estimator(layer, logits.expand(50, *layer.shape), loss, generator=generator)
    return estimator


def test_control_variates_from_the_slope_lower_the_variance() -> None:
    layer = dgrad.latent("10x2")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    plain = _variance(dgrad.estimator("rloo"), layer, logits, loss)
    double = _variance(_trained("double-cv", layer, logits, loss), layer, logits, loss)
    rodeo = _variance(_trained("rodeo", layer, logits, loss), layer, logits, loss)
    assert double < 0.5 * plain
    assert rodeo < double


@pytest.mark.parametrize("name", ["double-cv", "rodeo"])
def test_a_slope_that_misleads_is_soon_left_alone(name: str) -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer), small_objectives(layer)["spiky"]
    plain = _variance(dgrad.estimator("rloo"), layer, logits, loss)
    assert _variance(dgrad.estimator(name), layer, logits, loss) > 2 * plain
    assert _variance(_trained(name, layer, logits, loss), layer, logits, loss) < 1.1 * plain


def test_coefficients_are_the_regression_on_earlier_steps() -> None:
    generator, coefficients = Generator().manual_seed(0), Coefficients([1.0, 0.0])
    assert [float(each) for each in coefficients.current()] == [1.0, 0.0]
    for _ in range(100):
        first, second, noise = torch.randn(3, 64, 5, generator=generator)
        second = second + 0.5 * first
        coefficients.learn(-2 * first + 30 * second + 0.1 * noise, [first, second])
    assert [float(each) for each in coefficients.current()] == pytest.approx([2, -30], rel=0.02)


def test_coefficients_stay_finite_where_a_variate_vanishes_or_repeats() -> None:
    coefficients = Coefficients([1.0, 0.0])
    first = torch.randn(8, 5, generator=Generator().manual_seed(0))
    coefficients.learn(first, [torch.zeros(8, 5), first])
    assert [float(each) for each in coefficients.current()] == pytest.approx([0, -1], rel=0.01)
    coefficients.learn(first, [first, first])
    assert all(each.isfinite() for each in coefficients.current())
    coefficients = Coefficients([1.0, 0.0])
    coefficients.learn(1e-12 * first, [1e-12 * first, 1e-24 * first])  # the second one's square is 0 in float32
    assert all(each.isfinite() for each in coefficients.current())


# Bad input


@pytest.mark.parametrize("name", ["arm", "disarm", "arms", "bitflip-1"])
def test_other_than_binary_variables_are_refused(name: str) -> None:
    layer = dgrad.latent("20x10")
    with pytest.raises(dgrad.InputError, match=f"{name} is for binary variables, such as 20x2; got 20x10"):
        dgrad.estimator(name)(layer, torch.zeros(2, 20, 10), lambda codes: codes.sum((-2, -1)))


@pytest.mark.parametrize("name", ["arms", "double-cv", "rodeo"])
def test_a_single_sample_is_refused(name: str) -> None:
    with pytest.raises(dgrad.InputError, match="samples must be a whole number of at least 2; got 1"):
        dgrad.estimator(name, samples=1)


def test_log_odds_carry_no_gradient() -> None:
    assert not log_odds(torch.zeros(1, 1, 2, requires_grad=True)).requires_grad
