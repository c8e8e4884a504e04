"""An estimator that learns: `dgrad train --plugin examples/learned_baseline.py --estimator learned-baseline`."""

import math

import torch

import dgrad
from dgrad.core.estimator_tools import layer_missing, weighted


class LearnedBaseline(dgrad.GradientEstimator):
    """REINFORCE with a linear function of the logits as its baseline: `(f(z) - b(logits)) (z - E_q[z])`.

    The baseline is fitted to the loss.
    """

    baseline: torch.nn.Linear

    def set_layer(self, layer: dgrad.LatentLayer) -> None:
        # Its size is that of the code, which __init__ cannot know.
        self.baseline = torch.nn.Linear(math.prod(layer.shape), 1)

    @property
    def traits(self) -> dgrad.Traits:
        return dgrad.Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: 1,
            reference="Mnih & Gregor 2014",
        )

    def estimate(
        self,
        layer: dgrad.LatentLayer,
        logits: torch.Tensor,
        objective: dgrad.Objective,
        *,
        generator: torch.Generator | None = None,
    ) -> dgrad.Estimate:
        if not hasattr(self, "baseline"):
            raise layer_missing("learned-baseline")
        codes = layer.sample(logits, generator=generator)  # [1, B, *code]
        loss = objective(codes)  # [1, B]
        # Detached: the fit does not train the encoder.
        inputs = logits.detach().flatten(1).to(self.baseline.weight.dtype)
        baseline = self.baseline(inputs).squeeze(-1).to(loss.dtype)  # [B]
        advantage = loss.detach() - baseline  # [1, B]
        direction = weighted(codes - layer.mean(logits).detach(), advantage.detach())
        estimate = dgrad.replace_gradient(loss, logits, direction)
        # The gradient of (f - b)^2 / 2 joins the loss, and its value does not: the backward pass trains the baseline.
        estimate = dgrad.add_gradient(estimate, advantage.square() / 2)
        return dgrad.Estimate(loss=estimate.mean(0), codes=codes)


@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("learned-baseline", LearnedBaseline)
