"""Two discrete layers: the estimate of the inner one is the objective of the outer one.

The second code's logits depend on the first code, and the loss on both. The unbiased estimators are compared with
enumeration of both codes, within 5 standard errors of 2,000 draws. The file makes 384 such comparisons: with fresh
seeds one run in some 4,000 fails by chance. The seeds are fixed. Chains of codes with a gradient are compared exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator

LAYER = dgrad.latent("2x2")
DRAWS = 2000

BY_TRAIT = {
    trait: [name for name in dgrad.estimators() if getattr(dgrad.estimator(name).traits, trait)]
    for trait in ("unbiased", "pathwise")
}
COMBINATIONS = sorted({pair for name in BY_TRAIT["unbiased"] for pair in ((name, name), (name, "rloo"), ("leg", name))})


class Problem(NamedTuple):
    """Everything random from a fixed seed, in float64."""

    outer: Tensor  # [2, 2], logits of the first code
    inner: Tensor  # [2, 2], logits of the second code, but for what the first one adds
    mixing: Tensor  # [4, 4], what the first code adds to the logits of the second
    quadratic: Tensor  # [8, 8], the loss

    def inner_logits(self, first: Tensor, inner: Tensor) -> Tensor:
        """`[S, B, 2, 2]`, for first codes of that shape."""
        return inner + (first.flatten(-2) @ self.mixing).view(first.shape)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of pairs of codes `[..., 2, 2]`."""
        both = torch.cat(torch.broadcast_tensors(first.flatten(-2), second.flatten(-2)), -1)
        return (both @ self.quadratic * both).sum(-1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = Generator().manual_seed(0)
    shapes = ((2, 2), (2, 2), (4, 4), (8, 8))
    return Problem(*(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes))


@pytest.fixture(scope="module")
def truth(problem: Problem) -> tuple[Tensor, Tensor]:
    """The exact gradients for the two layers' logits."""
    outer, inner = problem.outer.clone().requires_grad_(), problem.inner.clone().requires_grad_()
    support = LAYER.enumerate(like=outer)  # [4, 2, 2]
    p_first = LAYER.log_prob(outer.unsqueeze(0), support.unsqueeze(1)).exp()[:, 0]  # [4]
    p_second = LAYER.log_prob(problem.inner_logits(support, inner), support.unsqueeze(1)).exp().T  # [first, second]
    losses = problem.loss(support.unsqueeze(1), support)  # [first, second]
    return torch.autograd.grad((p_first.unsqueeze(-1) * p_second * losses).sum(), (outer, inner))  # type: ignore[return-value]


def made(name: str) -> GradientEstimator:
    estimator = dgrad.estimator(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator.set_layer(LAYER)
    return estimator


def nested(problem: Problem, outer: str, inner: str, batch: int, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss of each of a batch of equal examples, and the leaves of the two layers' logits."""
    generator = Generator().manual_seed(seed)
    estimators = made(outer), made(inner)
    leaves = tuple(logits.expand(batch, 2, 2).clone().requires_grad_() for logits in (problem.outer, problem.inner))

    def objective(first: Tensor) -> Tensor:
        logits = problem.inner_logits(first, leaves[1]).flatten(0, 1)  # [S*B, 2, 2]
        flat = first.expand(-1, batch, 2, 2).flatten(0, 1)
        estimate = estimators[1](LAYER, logits, lambda second: problem.loss(flat, second), generator=generator)
        return estimate.loss.view(-1, batch)

    return estimators[0](LAYER, leaves[0], objective, generator=generator).loss, (leaves[0], leaves[1])


@pytest.mark.parametrize(("outer", "inner"), COMBINATIONS)
def test_two_layers_are_unbiased_where_both_estimators_are(
    outer: str, inner: str, problem: Problem, truth: tuple[Tensor, Tensor]
) -> None:
    loss, leaves = nested(problem, outer, inner, DRAWS)
    for gradients, exact in zip(torch.autograd.grad(loss.sum(), leaves), truth, strict=True):
        error = gradients.std(0) / DRAWS**0.5
        assert ((gradients.mean(0) - exact).abs() <= 5 * error + 1e-6).all(), (gradients.mean(0) - exact) / error


def test_the_comparison_finds_a_biased_estimator(problem: Problem, truth: tuple[Tensor, Tensor]) -> None:
    for pair, of in ((("gapped-st", "rloo"), 0), (("rloo", "gapped-st"), 1)):
        loss, leaves = nested(problem, *pair, DRAWS)
        gradients = torch.autograd.grad(loss.sum(), leaves)[of]
        assert ((gradients.mean(0) - truth[of]).abs() > 5 * gradients.std(0) / DRAWS**0.5).any()


@pytest.mark.parametrize("outer", BY_TRAIT["pathwise"])
def test_a_chain_of_codes_has_the_gradient_of_nested_estimates(outer: str, problem: Problem) -> None:
    for inner in BY_TRAIT["pathwise"]:
        loss, leaves = nested(problem, outer, inner, batch=3, seed=5)
        expected = torch.autograd.grad(loss.mean(), leaves)
        generator = Generator().manual_seed(5)
        first = made(outer).codes(LAYER, leaves[0], generator=generator)
        logits = problem.inner_logits(first, leaves[1]).flatten(0, 1)
        second = made(inner).codes(LAYER, logits, generator=generator)  # [S, S*B, 2, 2]
        total = problem.loss(first.flatten(0, 1), second).mean()
        for gradient, exact in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            torch.testing.assert_close(gradient, exact, msg=lambda text, name=inner: f"{name} inside: {text}")
