"""An estimator in one file: `dgrad train --plugin examples/estimator.py --estimator mine`."""

import torch

import dgrad
from dgrad.core.estimator_tools import weighted


class Mine(dgrad.GradientEstimator):
    """REINFORCE with a constant baseline: `(f(z) - baseline) (z - E_q[z])`."""

    def __init__(self, baseline: float | dgrad.Schedule = 20.0) -> None:
        super().__init__()
        self.hyperparameter("baseline", baseline)  # a number or a schedule: --set baseline=linear:40:15

    @property
    def traits(self) -> dgrad.Traits:
        return dgrad.Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: 1,
            reference="Williams 1992",
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
        loss = objective(codes)  # [1, B]
        with torch.no_grad():
            direction = weighted(codes - layer.mean(logits), loss - self.baseline)
        return dgrad.Estimate(loss=dgrad.replace_gradient(loss, logits, direction).mean(0), codes=codes)


@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("mine", Mine)
