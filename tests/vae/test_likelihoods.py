"""Likelihoods of grey pixels: probabilities that add up, bits per dimension, and the error of reconstructions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

import dgrad
from dgrad.data import Split
from dgrad.vae.evaluation import evaluate_psnr, grey_figures
from dgrad.vae.likelihoods import DiscretizedLogistic, bits_per_dimension, likelihood
from dgrad_plugins.models._dense import linear_vae

LEVELS = torch.arange(256.0).unsqueeze(1) / 255  # [256, 1]


@pytest.mark.parametrize("location", [-40.0, -1.0, -0.3, 0.0, 0.9999, 3.0], ids=str)
@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -3.0, 0.0, 5.0], ids=str)
def test_the_probabilities_of_all_levels_add_up_to_one(location: float, log_scale: float) -> None:
    outputs = torch.tensor([location, log_scale], dtype=torch.float64).expand(256, 2)
    loss = DiscretizedLogistic().loss(outputs, LEVELS.double())
    assert float((-loss).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert loss.isfinite().all()


def test_the_loss_is_the_difference_of_two_logistic_functions_and_float32_agrees() -> None:
    generator = Generator().manual_seed(0)
    outputs = torch.randn(50, 2 * 7, generator=generator, dtype=torch.float64) / 3  # farther out, this one cancels
    levels = torch.randint(0, 256, (50, 7), generator=generator).double()
    levels[0], levels[1] = 0, 255
    location, scale = outputs[:, :7], outputs[:, 7:].exp()
    x, half = 2 * levels / 255 - 1, 1 / 255
    above = torch.where(levels == 255, 1.0, ((x + half - location) / scale).sigmoid())
    below = torch.where(levels == 0, 0.0, ((x - half - location) / scale).sigmoid())
    expected = -(above - below).log().sum(-1)
    torch.testing.assert_close(DiscretizedLogistic().loss(outputs, levels / 255), expected)
    single = DiscretizedLogistic().loss(outputs.float(), (levels / 255).float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-4)


def test_gradients_stay_finite_far_from_the_pixel() -> None:
    outputs = torch.tensor([[300.0, -20.0], [-300.0, 50.0], [0.0, 0.0]], requires_grad=True)
    for level in (0.0, 0.5, 1.0):
        loss = DiscretizedLogistic().loss(outputs, torch.full((3, 1), level)).sum()
        (gradient,) = torch.autograd.grad(loss, outputs)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_outputs_that_all_images_share_give_the_same_losses() -> None:
    outputs, images = torch.randn(3, 1, 8, generator=Generator().manual_seed(0)), torch.rand(5, 4)
    shared = DiscretizedLogistic().loss(outputs, images)
    torch.testing.assert_close(shared, DiscretizedLogistic().loss(outputs.expand(3, 5, 8), images))


def test_a_decoder_of_too_few_outputs_is_refused() -> None:
    loss = dgrad.discretized_logistic(torch.rand(2, 4))
    with pytest.raises(dgrad.InputError, match=r"gives 4 outputs .* expected 2 outputs for each number"):
        loss(torch.zeros(1, 2, 4))


def test_a_uniform_model_of_256_levels_has_8_bits() -> None:
    """So wide a logistic variable that all but the two outermost levels are alike has none of its mass inside."""
    assert bits_per_dimension(likelihood("discretized-logistic"), 3 * math.log(256), 3) == pytest.approx(8)
    assert bits_per_dimension(likelihood("bernoulli"), 100.0, 3) is None
    assert bits_per_dimension(likelihood("squared-error"), 100.0, 3) is None


@pytest.mark.parametrize("kind", ["bernoulli", "squared-error", "discretized-logistic"])
def test_the_figures_of_grey_pixels(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = linear_vae(dgrad.latent("3x4"), (1, 2, 3), likelihood(kind))
    images = torch.rand(30, 1, 2, 3, generator=Generator().manual_seed(0))
    split = Split(images)
    with torch.no_grad():
        decoded = model.decode(model.layer.argmax(model.encoder(images)))
    error = float((decoded - images).square().mean())
    assert evaluate_psnr(model, split) == pytest.approx(10 * math.log10(1 / error), rel=1e-5)
    figures = grey_figures(model, split, 12.0)
    assert figures.get("bits_per_dimension") == (12 / (6 * math.log(2)) if kind == "discretized-logistic" else None)


@pytest.mark.parametrize("log_scale", [-4.5, -3.0, -2.0])
@pytest.mark.parametrize("location", [0.0, 0.5])
def test_curvature_of_rounded_logistic_pixels_is_their_fisher_information(location: float, log_scale: float) -> None:
    likelihood = DiscretizedLogistic()
    levels = LEVELS.double()
    outputs = torch.tensor([location, log_scale], dtype=torch.float64).repeat(256, 1).requires_grad_()
    loss = likelihood.loss(outputs, levels)
    (score,) = torch.autograd.grad(loss.sum(), outputs)
    probability = (-loss.detach()).exp()

    information = torch.einsum("x,xi,xj->ij", probability, score, score)
    curvature = likelihood.root_curvature(outputs.detach()[:1]).square().diag_embed()[0]
    # Rounding takes 2 % of the information at a scale of 3 levels, and the ends of the range as much at a scale of 17.
    scale = curvature.diagonal().sqrt()
    torch.testing.assert_close(information / scale.outer(scale), torch.eye(2, dtype=torch.float64), atol=0.025, rtol=0)
