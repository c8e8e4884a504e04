"""The convolutional model: images of any size, a code alone, and steps that stay finite."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.objectives import FunctionObjective
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.models._convolutional import conv_vae


def _model(shape: tuple[int, int, int], hidden: tuple[int, ...], gaussian: int, kind: str = "bernoulli") -> DiscreteVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return conv_vae(dgrad.latent("3x4"), shape, likelihood(kind), hidden, gaussian)


def _images(shape: tuple[int, int, int], count: int = 2) -> Tensor:
    return torch.rand(count, *shape, generator=Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["bernoulli", "discretized-logistic"])
@pytest.mark.parametrize("gaussian", [0, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (1, 1, 6), (3, 2, 1), (1, 1, 1), (1, 28, 28)], ids=str)
def test_images_of_any_size_come_back(shape: tuple[int, int, int], gaussian: int, kind: str) -> None:
    for hidden in ((), (2, 3, 4)):
        model, images = _model(shape, hidden, gaussian, kind), _images(shape)
        posterior = model.posterior(images)
        assert posterior.logits.shape == (2, 3, 4)
        assert (posterior.gaussian is None) == (gaussian == 0)
        codes, style = model.layer.argmax(posterior.logits), posterior.draw(generator=Generator().manual_seed(0))
        assert model.decode(codes, style).shape == images.shape
        assert model.reconstruction(images, style)(codes.unsqueeze(0)).isfinite().all()


def test_every_pixel_is_seen_and_made_of_the_code() -> None:
    model, images = _model((1, 7, 9), (3, 4), 0), _images((1, 7, 9)).requires_grad_()
    torch.autograd.backward(model.posterior(images).logits.sum())
    assert images.grad is not None
    assert (images.grad != 0).all()
    codes = model.layer.codes(torch.tensor([[0, 1, 2], [3, 2, 0]]))
    first, second = model.decode(codes)
    assert (first != second).all()


@pytest.mark.parametrize("gaussian", [0, 3])
def test_the_sweep_is_the_enumerated_one(gaussian: int) -> None:
    shape = (3, 5, 4)
    model, images = _model(shape, (3, 4), gaussian).double(), _images(shape).double()
    posterior = model.posterior(images)
    objective = model.reconstruction(images, posterior.draw(generator=Generator().manual_seed(0)))
    codes = model.layer.sample(posterior.logits, 2, generator=Generator().manual_seed(2))
    truth = FunctionObjective(objective).sweep(codes)
    assert truth.std() > 1e-3
    torch.testing.assert_close(objective.sweep(codes), truth)


def test_variances_that_an_encoder_lets_run_away_stay_finite() -> None:
    """At a rate of 0.01 log-variances came to 106 in 12 steps, and the loss with them to infinity."""
    model = _model((1, 4, 4), (2,), 3)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1e3)
    logits, parameters = model.encoder(_images((1, 4, 4)))
    mean, log_variance = parameters.chunk(2, -1)
    assert mean.abs().max() > 100
    assert log_variance.max() <= 5
    assert log_variance.min() < -100, "small variances are left alone"
    assert logits.isfinite().all()
