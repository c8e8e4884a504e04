"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, weighted
from dgrad.core.latent_layer import Logits
from dgrad.core.weights import leave_one_out


class LeaveOneOut(GradientEstimator):
    """REINFORCE with the mean of the other samples' losses as the baseline of each.

    `sum_m (f_m - mean f) (z_m - E_q[z]) / (S - 1)`.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: none. Less variance than REINFORCE with a moving average. No state.

    Cost: S >= 2 evaluations of any objective.

    Reference: Kool, van Hoof & Welling 2019, Buy 4 REINFORCE samples, get a baseline for free.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("rloo", samples=4)(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.codes.shape
    torch.Size([4, 4, 2, 3])
    """

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self.samples,
            reference="Kool et al. 2019",
            one_pass=True,
            losses_of_sites=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        return Drawn(layer.sample(logits, self.samples, generator=generator))  # [S, B, *code]

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        with torch.no_grad():
            # (f_m - mean of the others) (z_m - E_q[z])
            direction = weighted(drawn.codes - layer.mean(logits), leave_one_out(loss))
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=drawn.codes)
