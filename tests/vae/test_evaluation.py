"""The bounds against plain torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical, kl_divergence

import dgrad
from dgrad.data import Split
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.vae.evaluation import evaluate_bound, evaluation_generator, importance_weighted_bound
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.models._dense import linear_vae


def _model(spec: str, pixels: int = 6, scale: float = 1.0) -> tuple[DiscreteVAE, Split]:
    torch.manual_seed(0)
    model = linear_vae(dgrad.latent(spec), (1, 1, pixels), likelihood("bernoulli"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 * scale).requires_grad_(False)
    images = (torch.rand(40, 1, 1, pixels, generator=Generator().manual_seed(1)) < 0.4).float()
    return model, Split(images)


def _log_joint(model: DiscreteVAE, images: Tensor, codes: Tensor) -> Tensor:
    """`log p(x | z) + log p(z)` from torch.distributions: codes `[K, n, k]` -> `[K, N]`."""
    outputs = model.decoder(codes).unsqueeze(1)
    uniform = Independent(OneHotCategorical(logits=torch.zeros(model.layer.shape)), 1)
    return Independent(Bernoulli(logits=outputs), 1).log_prob(images.flatten(1)) + uniform.log_prob(codes)[:, None]


@pytest.mark.parametrize("spec", ["1x8", "3x3"])
def test_a_small_support_is_summed_exactly(spec: str) -> None:
    model, split = _model(spec)
    logits = model.encoder(split.images)
    posterior = Independent(OneHotCategorical(logits=logits), 1)
    uniform = Independent(OneHotCategorical(logits=torch.zeros_like(logits)), 1)
    codes = model.layer.enumerate(like=logits)
    q = posterior.log_prob(codes.unsqueeze(1)).exp()
    log_likelihood = _log_joint(model, split.images, codes) - model.layer.log_prior
    reconstruction = -(q * log_likelihood).sum(0).mean()
    bound = evaluate_bound(model, split, samples=1, generator=Generator())
    assert bound.reconstruction == pytest.approx(float(reconstruction), rel=1e-5)
    assert bound.kl == pytest.approx(float(kl_divergence(posterior, uniform).mean()), rel=1e-5)
    assert bound.bound == bound.reconstruction + bound.kl
    assert bound.standard_error == 0


def test_a_large_support_is_sampled_and_its_error_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled bound within 5 of its standard errors of the exact one: one false alarm in 1.7 million."""
    model, split = _model("3x3")
    exact = evaluate_bound(model, split, samples=1, generator=Generator())
    monkeypatch.setattr("dgrad.vae.evaluation.EXACT_SUPPORT", 1)
    sampled = evaluate_bound(model, split, samples=200, generator=Generator().manual_seed(0))
    assert 0 < sampled.standard_error < 0.05
    assert abs(sampled.bound - exact.bound) < 5 * sampled.standard_error
    assert sampled.kl == pytest.approx(exact.kl)
    assert math.isnan(evaluate_bound(model, split, samples=1, generator=Generator()).standard_error)


def test_the_importance_weighted_bound_falls_to_the_log_likelihood() -> None:
    model, split = _model("3x3", scale=0.7)
    codes = model.layer.enumerate(like=torch.zeros(1))
    truth = float(-_log_joint(model, split.images, codes).logsumexp(0).mean())
    bound = evaluate_bound(model, split, samples=1, generator=Generator()).bound
    values = [
        importance_weighted_bound(model, split, samples=samples, generator=Generator().manual_seed(0))
        for samples in (1, 20, 3000)
    ]
    assert truth < values[2] + 0.02 < values[1] + 0.02 < values[0]
    assert values[2] == pytest.approx(truth, abs=0.03)
    assert values[0] == pytest.approx(bound, abs=1.0), "with one sample it is the evidence bound"


@pytest.mark.slow
def test_an_evaluation_repeats_and_leaves_the_global_generator_alone(train: Callable[..., Run]) -> None:
    run = train(latent="6x4")
    model, _ = load_model(run)
    data = Build(run.config).evaluation_data
    before = torch.get_rng_state()
    bounds = [
        evaluate_bound(model, data.test, samples=2, generator=evaluation_generator(torch.device("cpu"), 3))
        for _ in range(2)
    ]
    assert bounds[0] == bounds[1]
    assert torch.equal(torch.get_rng_state(), before)
