"""direct-rb: direct with its noise integrated out, and the divergence that it descends."""

from __future__ import annotations

import pytest
import torch
from helpers import mean_of_direct
from torch import Generator

import dgrad
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import FunctionObjective
from dgrad.testing import small_logits, small_objectives


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["backward", "forward", "central"])
def test_direct_rb_is_direct_with_its_noise_integrated_out(difference: str) -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)["smooth"]
    sampled = mean_of_direct("direct", layer, logits, loss, epsilon=0.5, difference=difference)
    integrated = mean_of_direct("direct-rb", layer, logits, loss, epsilon=0.5, difference=difference)
    error = (sampled[1].square() + integrated[1].square()).sqrt()
    assert ((sampled[0] - integrated[0]).abs() <= 5 * error).all()
    assert (integrated[1] < sampled[1]).all(), "less variance in every coordinate"


@pytest.mark.parametrize("epsilon", [0.02, 0.5, 0.9, 1.0])
def test_direct_rb_with_the_kl_inside_descends_a_renyi_divergence(epsilon: float) -> None:
    """Of each row's q and its posterior given the other rows: order 1 - epsilon, divided by 1 - epsilon.

    At epsilon 1 it is KL(posterior | q).
    """
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=30).requires_grad_(), small_objectives(layer)["cross-entropy"]
    objective = FunctionObjective(loss) + KLObjective(layer, logits)
    estimate = dgrad.estimator("direct-rb", epsilon=epsilon)(
        layer, logits, objective, generator=Generator().manual_seed(3)
    )
    ours = torch.autograd.grad(estimate.loss.sum(), logits)[0]
    assert estimate.codes is not None
    posterior = FunctionObjective(loss).sweep(estimate.codes)[0].neg().log_softmax(-1)  # the prior is uniform
    q = logits.log_softmax(-1)
    if epsilon == 1:
        divergence = (posterior.exp() * (posterior - q)).sum(-1)
    else:
        renyi = -((1 - epsilon) * q + epsilon * posterior).logsumexp(-1) / epsilon
        divergence = renyi / (1 - epsilon)
    expected = torch.autograd.grad(divergence.sum(), logits)[0]
    assert torch.allclose(ours, expected, atol=1e-6)  # epsilon itself is held in float32
    assert ours.abs().max() > 0.01
