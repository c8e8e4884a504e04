"""The estimator `weighted-rloo`."""

from __future__ import annotations

import dgrad
import torch
from dgrad.core.estimator_tools import check_count, weighted


class WeightedRlooEstimator(dgrad.GradientEstimator):
    """REINFORCE with a share of the mean loss of the other samples as the baseline of each.

    `1/S sum_m (f_m - weight * mean of the other f) (z_m - E_q[z])`.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: none for every weight, because the losses of the others know nothing of sample m. Weight 0 is plain REINFORCE,
    weight 1 the leave-one-out baseline. No state.

    Cost: S >= 2 evaluations of any objective.

    Reference: Williams 1992; Kool, van Hoof & Welling 2019.
    """

    weight: torch.Tensor

    def __init__(self, samples: int = 4, weight: float | dgrad.Schedule = 1.0) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)
        # A number or a schedule; `self.weight` holds the value of the current step.
        self.hyperparameter("weight", weight)

    @property
    def traits(self) -> dgrad.Traits:
        return dgrad.Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self.samples,
            reference="Kool et al. 2019",
        )

    def estimate(
        self,
        layer: dgrad.LatentLayer,
        logits: torch.Tensor,
        objective: dgrad.Objective,
        *,
        generator: torch.Generator | None = None,
    ) -> dgrad.Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, *code]
        loss = objective(codes)  # [S, B]
        with torch.no_grad():
            # mean of the other f
            others = (loss.sum(0) - loss) / (self.samples - 1)  # [S, B]
            # grad log q(z) = z - E_q[z]
            direction = weighted(codes - layer.mean(logits), loss - self.weight * others)
        return dgrad.Estimate(loss=dgrad.replace_gradient(loss, logits, direction).mean(0), codes=codes)
