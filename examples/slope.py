"""An estimator that differentiates the objective: `dgrad train --plugin examples/slope.py --estimator slope`."""

import torch

import dgrad


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
            limit=dgrad.ExactLimit(exact_for="linear"),
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
        at = objective.at(codes, differentiable=True)
        # The slope has no gradient of its own: the decoder learns from the loss alone.
        surrogate = (at.slope() * layer.mean(logits)).flatten(2).sum(-1)  # [1, B]
        return dgrad.Estimate(loss=dgrad.add_gradient(at.loss, surrogate).mean(0), codes=codes)


@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("slope", Slope)
