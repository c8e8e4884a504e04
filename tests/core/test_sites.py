"""Sequences, masks, forbidden values and mixed sizes, for every estimator, against enumeration by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from tests.helpers import with_layer

DRAWS = 3000
"""Copies of each example in a batch: the mean over them is the Monte-Carlo mean."""
ERRORS = 5
"""Standard errors that a mean may be off: one false alarm in 1.7 million coordinates of a normal mean.

A run of this file compares some 1,500 coordinates. The seeds are fixed."""

T = 3
LENGTHS = (3, 1, 2)
MASK = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)  # [3, T]


class Problem:
    """Three examples of `[T, 1, k]`: ragged lengths, a forbidden value by `allowed`, another by a logit of -inf."""

    def __init__(self, k: int) -> None:
        generator = Generator().manual_seed(0)
        self.layer = dgrad.latent(f"1x{k}")
        self.logits = torch.randn(3, T, 1, k, dtype=torch.float64, generator=generator)
        self.allowed = torch.ones(3, T, 1, k, dtype=torch.bool)
        self.allowed[0, 1, 0, 0] = False
        self.logits[2, 0, 0, k - 1] = -torch.inf
        self.logits[~MASK] = torch.nan  # padding may be anything
        self.reachable = self.allowed & (self.logits > -torch.inf) & MASK[..., None, None]
        self.site_weight = torch.randn(T, k, dtype=torch.float64, generator=generator)
        self.mixing = torch.randn(T * k, T * k, dtype=torch.float64, generator=generator)

    def losses(self, codes: Tensor, credit: str) -> Tensor:
        """Of codes `[..., T, 1, k]`: `[..., T]` for local credit, `[...]` of the whole example otherwise."""
        own = (codes.squeeze(-2) * self.site_weight).sum(-1)  # [..., T]
        if credit == "site":
            return own + own.square()
        if credit == "future":  # a site's loss depends on its code and the earlier ones
            return own.cumsum(-1).square()
        flat = codes.flatten(-3)
        return torch.einsum("...i,ij,...j->...", flat, self.mixing, flat) / 2

    def expected(self, logits: Tensor, credit: str) -> Tensor:
        """`E[f]` of each example, by a loop over its codes; local losses summed over its sites."""
        totals = []
        for b, length in enumerate(LENGTHS):
            log_q = torch.where(self.reachable[b], logits[b], -1e30).log_softmax(-1)
            total = torch.zeros((), dtype=torch.float64)
            choices = [self.reachable[b, t, 0].nonzero().flatten().tolist() for t in range(length)]
            for values in itertools.product(*choices):
                code = torch.zeros(T, 1, self.logits.shape[-1], dtype=torch.float64)
                for t, value in enumerate(values):
                    code[t, 0, value] = 1
                loss = self.losses(code, credit)
                if credit != "example":
                    loss = loss[:length].sum()
                total = total + sum(log_q[t, 0, value] for t, value in enumerate(values)).exp() * loss
            totals.append(total)
        return torch.stack(totals)

    def exact(self, credit: str) -> tuple[Tensor, Tensor]:
        logits = torch.where(self.reachable, self.logits, 0).requires_grad_()
        value = self.expected(logits, credit)
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    def objective(self, credit: str) -> dgrad.core.objectives.CodeLoss:
        """The same as an estimator gets it. It refuses what it must never see."""

        def loss(codes: Tensor) -> Tensor:
            repeats = codes.shape[1] // 3
            reachable = self.reachable.repeat(repeats, 1, 1, 1)
            forbidden = (codes.detach() != 0) & ~reachable
            assert not forbidden.any(), "it was evaluated at a forbidden value, or at padding"
            sums = codes.detach().sum((-2, -1))
            torch.testing.assert_close(sums, MASK.repeat(repeats, 1).to(sums.dtype).expand_as(sums))
            losses = self.losses(codes, credit)
            if credit == "example":
                return losses
            return torch.where(MASK.repeat(repeats, 1), losses, torch.nan)  # padded entries are ignored

        return loss


def _estimator(name: str, layer: dgrad.LatentLayer) -> GradientEstimator:
    return with_layer(name, layer, **HYPERPARAMETERS.get(name, {}))


HYPERPARAMETERS: dict[str, dict[str, object]] = {"reinforce": {"baseline": "input-dependent", "hidden": 4}}
BINARY = ("arm", "arms", "bitflip-1", "disarm")
NAMES = sorted(dgrad.estimators())


@pytest.fixture(scope="module")
def problems() -> dict[int, Problem]:
    return {k: Problem(k) for k in (2, 3)}


@pytest.mark.parametrize("credit", ["example", "site", "future"])
@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_right(name: str, credit: str, problems: dict[int, Problem]) -> None:
    """Ragged lengths, `allowed` and -inf in one batch: the value and the gradient, and no gradient elsewhere."""
    problem = problems[2 if name in BINARY else 3]
    mask = MASK.repeat(DRAWS, 1)
    layer = problem.layer if credit != "example" else dgrad.restricted(problem.layer, mask=mask)
    if credit == "future" and not dgrad.estimator(name).traits.losses_of_sites:
        layer = dgrad.restricted(problem.layer, mask=mask)
    estimator = _estimator(name, layer)
    logits = problem.logits.repeat(DRAWS, 1, 1, 1).requires_grad_()
    estimate = estimator(
        problem.layer,
        logits,
        problem.objective(credit),
        mask=mask,
        allowed=problem.allowed.repeat(DRAWS, 1, 1, 1),
        credit=credit,
        generator=Generator().manual_seed(1),
    )
    assert estimate.loss.shape == (3 * DRAWS,)
    assert estimate.codes.shape[1:] == logits.shape
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    assert estimate.loss.isfinite().all()
    assert not gradient[~problem.reachable.repeat(DRAWS, 1, 1, 1)].any(), "a gradient where nothing is free"
    assert gradient.isfinite().all()
    value, truth = problem.exact(credit)
    if estimator.traits.unbiased:
        _close(gradient.view(DRAWS, *truth.shape), truth)
    if estimator.traits.unbiased_value:
        _close(estimate.loss.detach().view(DRAWS, 3), value)


def _close(draws: Tensor, truth: Tensor) -> None:
    """The mean over draws is within 5 standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    excess = (draws.mean(0) - truth).abs() - ERRORS * error
    assert (excess <= 1e-6).all(), f"off by {(draws.mean(0) - truth).abs().max():.3g}, error {error.max():.2g}"
