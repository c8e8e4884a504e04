"""REINFORCE, the score-function estimator. May import torch and dgrad."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.gradient_estimator import Estimate, GradientEstimator, Traits, check_choice, check_count, replace_gradient
from dgrad.latent_layer import LatentLayer
from dgrad.objectives import Objective

DECAY = 0.99
BASELINES = ("none", "moving-average")


class Reinforce(GradientEstimator):
    """REINFORCE: the loss times the gradient of `log q`, less a baseline that has not seen the sample.

    `(f(z) - b) (z - E_q[z])`; `b` is 0, or the moving average of the losses of earlier steps (decay 0.99, corrected for its start).

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Unbiased; high variance. S evaluations, any objective. The moving average is a buffer: it travels in the state dict.

    Source: Williams 1992; Glynn 1990.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("reinforce")(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.loss.shape
    torch.Size([4])
    """

    average: Tensor
    weight: Tensor

    def __init__(self, samples: int = 1, baseline: str = "moving-average") -> None:
        super().__init__()
        self.samples = check_count("samples", samples)
        self.baseline = check_choice("baseline", baseline, BASELINES)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self.samples,
            reference="Williams 1992",
        )

    def estimate(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        objective: Objective,
        *,
        generator: Generator | None = None,
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, *code]
        loss = objective(codes)  # [S, B]
        with torch.no_grad():
            score = (codes - layer.mean(logits)).flatten(2)  # [S, B, n*k]
            # (f(z) - b) grad log q(z)
            direction = ((loss - self._baseline()).unsqueeze(-1) * score).view_as(codes)
            self._learn(loss)
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=codes)

    def _baseline(self) -> Tensor:
        return self.average / self.weight.clamp_min(1 - DECAY)

    def _learn(self, loss: Tensor) -> None:
        if self.baseline == "moving-average":
            self.average.mul_(DECAY).add_((1 - DECAY) * loss.mean())
            self.weight.mul_(DECAY).add_(1 - DECAY)
