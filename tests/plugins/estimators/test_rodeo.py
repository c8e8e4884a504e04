"""rodeo: its quadratic term and its surrogates, by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import EveryDraw, estimate_and_gradient, gradient_of, train_learned_parts, variance_of
from torch import Generator, Tensor

import dgrad
from benchmarks.rodeo import Published
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._rodeo import Rodeo, SurrogateNetwork, _surrogates


def test_rodeo_without_its_quadratic_term_is_double_cv() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["cross-entropy"]
    gradients = [
        estimate_and_gradient(dgrad.estimator(name), layer, logits, loss)[1] for name in ("rodeo", "double-cv")
    ]
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


@pytest.mark.slow
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


def _random_network(samples: int) -> Rodeo:
    """Parameters and averages as if something had been learned."""
    estimator = Rodeo(samples, surrogate="network", hidden=5)
    assert estimator.network is not None
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        estimator.network.averages.copy_(torch.tensor([0.3, 2.0, 0.5]))
        estimator.network.weight.fill_(1)
    return estimator.eval().double()


@pytest.mark.parametrize(("spec", "samples"), [("3x2", 2), ("1x5", 2), ("2x3", 2), ("1x3", 3)])
def test_rodeo_is_unbiased_with_any_network_by_enumeration(spec: str, samples: int) -> None:
    """Every tuple of codes, weighted by its probability."""
    layer = EveryDraw(*map(int, spec.split("x")))
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    draws = layer.sample(logits, samples)  # [S, K^S, n, k]
    weights = layer.log_prob(logits, draws.flatten(0, 1).unsqueeze(1)).view(samples, -1).sum(0).exp()
    each = logits.expand(len(weights), -1, -1)
    gradients = gradient_of(_random_network(samples), layer, each, loss)
    plain = gradient_of(Rodeo(samples).eval(), layer, each, loss)
    assert (gradients - plain).abs().max() > 0.1  # the network says something
    mean = (weights[:, None, None] * gradients).sum(0)
    torch.testing.assert_close(mean, exact_gradient(layer, logits, loss)[0])


def test_the_network_is_that_of_the_paper() -> None:
    """With the same weights, the same gradient as the paper's formula for bits, written out in the benchmark."""
    layer, batch = dgrad.latent("4x2"), 6
    logits = small_logits(layer, batch=batch).float()
    codes = layer.sample(logits, 2, generator=Generator().manual_seed(0))
    loss, bit_slope = torch.randn(2, batch), torch.randn(2, batch, 4)
    slope = torch.stack([-bit_slope / 2, bit_slope / 2], -1)
    theirs, ours = Published(), SurrogateNetwork(100)
    with torch.no_grad():
        theirs.alpha.fill_(1)
        theirs.beta.fill_(1)
        ours.inputs.weight.copy_(torch.cat([theirs.of_loss.weight, theirs.of_prediction.weight], 1))
        ours.inputs.bias.zero_()
        ours.outputs.load_state_dict(theirs.outputs.state_dict())
        p = logits.softmax(-1)
        expected = theirs(codes[..., 1], p[..., 1], loss, bit_slope)
        plain = ((loss - loss.flip(0)).unsqueeze(-1) * (codes - p)[..., 1]).mean(0)
        got = plain + ours(p, codes, loss, slope)[..., 1].mean(0)
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_the_network_takes_off_what_a_quadratic_leaves() -> None:
    """Less than three quarters of the variance. 10,000 draws tell it to within 3 %."""
    layer = dgrad.latent("4x2")
    logits, loss = small_logits(layer, batch=50), small_objectives(layer)["cross-entropy"]
    torch.manual_seed(0)
    variances = []
    for surrogate in ("quadratic", "network"):
        estimator = dgrad.estimator("rodeo", samples=2, surrogate=surrogate)
        if surrogate == "network":
            train_learned_parts(estimator, layer, logits, loss, steps=400, lr=0.005)
        else:
            for seed in range(100):
                estimate_and_gradient(estimator, layer, logits, loss, seed=seed)
        variances.append(variance_of(estimator.eval(), layer, logits[:1], loss))
    assert variances[1] < 0.75 * variances[0], variances
