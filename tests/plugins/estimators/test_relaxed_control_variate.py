"""The relaxed control variate that rebar and relax share: it learns, and leaves the decoder alone."""

from __future__ import annotations

import pytest
import torch
from helpers import gradient_of, train_learned_parts, variance_of, with_layer
from torch import Generator, Tensor

import dgrad
from dgrad.testing import small_logits, small_objectives

LEARNING = [
    ("rebar", {}),
    ("relax", {}),
    ("relax", {"with_loss": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("rebar", {"eta": 0.2, "temperature": 3.0}),
        ("relax", {}),
        ("relax", {"with_loss": True, "temperature": 3.0}),
    ],
    ids=str,
)
def test_learning_lowers_the_variance(name: str, hyperparameters: dict[str, object]) -> None:
    """To less than three quarters of what it was."""
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    estimator = with_layer(name, layer, **hyperparameters)
    with torch.no_grad():  # the moving average comes by itself: start where it is there
        for _ in range(100):
            estimator(layer, logits.expand(64, -1, -1), loss, generator=Generator().manual_seed(2))
    before = variance_of(estimator, layer, logits, loss, 20_000)
    train_learned_parts(estimator, layer, logits.expand(64, -1, -1), loss, steps=200, lr=1e-2)
    assert variance_of(estimator, layer, logits, loss, 20_000) < 0.75 * before


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_learned_parts_descend_the_mean_squared_gradient(name: str) -> None:
    """The gradient of every learned number against finite differences, with the same noise."""
    layer = dgrad.latent("2x3")
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["cross-entropy"]
    estimator = with_layer(name, layer, **({"hidden": 3, "with_loss": True} if name == "relax" else {})).double()
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    def penalty() -> float:
        return float(gradient_of(estimator, layer, logits, loss).square().sum((-2, -1)).mean())

    parameters = list(estimator.parameters())
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    gradients = torch.autograd.grad(estimate.loss.mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            start, values = flat[i].item(), []
            for shift in (1e-5, -1e-5):
                flat[i] = start + shift
                values.append(penalty())
            flat[i] = start
            assert float(gradient.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("name", "hyperparameters"), LEARNING, ids=str)
def test_the_control_variate_leaves_the_decoder_alone(name: str, hyperparameters: dict[str, object]) -> None:
    """The decoder's gradient is that of the loss at the hard codes alone."""
    layer = dgrad.latent("2x3")
    estimator = with_layer(name, layer, **hyperparameters)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=Generator().manual_seed(0)).requires_grad_()

    def loss(codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ torch.tanh(weight).T).exp().sum(-1)

    logits = small_logits(layer, batch=5).requires_grad_()
    estimate = estimator(layer, logits, loss)
    (gradient,) = torch.autograd.grad(estimate.loss.mean(), weight, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(estimate.codes).mean(), weight)[0])
    estimate.loss.mean().backward()
