"""An estimator in one file: `dgrad train --plugin examples/estimator.py --estimator mine`."""

import torch

import dgrad


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
            score = (codes - layer.mean(logits)).flatten(2)  # [1, B, n*k]
            direction = ((loss - self.baseline).unsqueeze(-1) * score).view_as(codes)
        return dgrad.Estimate(loss=dgrad.replace_gradient(loss, logits, direction).mean(0), codes=codes)


@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("mine", Mine)
