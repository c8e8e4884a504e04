"""An estimator that differentiates the objective: `dgrad train --plugin examples/slope.py --estimator slope`."""

import torch

import dgrad
from dgrad.core.estimator_tools import loss_and_slope


class Slope(dgrad.GradientEstimator):
    """Straight-through: the objective's gradient at a hard code, carried back through the mean of the code.

    `(d E_q[z] / d logits)' f'(z)`: right for objectives that are linear in the code, biased for all others.
    """

    @property
    def traits(self) -> dgrad.Traits:
        return dgrad.Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: 1,
            reference="Bengio et al. 2013",
            limit=dgrad.Limit(exact_for="linear"),
        )

    def estimate(
        self,
        layer: dgrad.LatentLayer,
        logits: torch.Tensor,
        objective: dgrad.Objective,
        *,
        generator: torch.Generator | None = None,
    ) -> dgrad.Estimate:
        codes = layer.sample(logits, generator=generator)  # [1, B, *code]
        # The slope has no gradient of its own: what the decoder learns is the gradient of the loss, and nothing else.
        loss, slope = loss_and_slope(objective, codes)  # [1, B], [1, B, *code]
        surrogate = (slope * layer.mean(logits)).flatten(2).sum(-1)  # [1, B]
        return dgrad.Estimate(loss=dgrad.add_gradient(loss, surrogate).mean(0), codes=codes)


@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("slope", Slope)
