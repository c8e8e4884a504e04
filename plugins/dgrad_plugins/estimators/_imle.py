"""Implicit maximum likelihood estimation."""

from __future__ import annotations

from torch import Generator, Tensor

from dgrad import Estimate, ExactLimit, GradientEstimator, LatentLayer, Objective, Schedule, Traits, replace_gradient
from dgrad.core.estimator_tools import carry_back, check_count, needs, perturb_and_map
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._differences import difference


class ImplicitMaximumLikelihood(GradientEstimator):
    """I-MLE: the difference of two perturbed MAP states, along the objective's slope.

    `[z(phi + lambda h + G) - z(phi - lambda h + G)] / (2 lambda)`, with `h` the gradient of `f` at the code `z(phi +
    G)`, lambda the strength and the same noise `G` throughout.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`. Any latent layer with a MAP solver.

    Bias: as the strength falls it becomes exact for quadratic objectives. The variance is ~ 1/lambda: the gradient is
    zero where the two states agree. The strength has the scale of the logits over the loss: `aimle` adapts it.

    Cost: S evaluations, one backward pass and 3 S MAP solves.

    Reference: Niepert, Minervini & Franceschi 2021, Implicit MLE (arXiv 2106.01798); two-sided: Minervini et al. 2023.
    The one-sided original is `direct-linear`, whose central difference this is.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> estimator = dgrad.estimator("imle", strength=1e6)  # so strong that the noise plays no part
    >>> estimator(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> 1e6 * logits.grad
    tensor([[[-0.5000,  0.5000]]])
    """

    strength: Tensor

    def __init__(self, strength: float | Schedule = 0.1, samples: int = 1) -> None:
        super().__init__()
        self.hyperparameter("strength", strength, above=0)
        self.samples = check_count("samples", samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Niepert et al. 2021; Minervini et al. 2023",
            why_unsupported=needs("imle", "noise"),
            kl_inside=True,
            perturbs=True,
            limit=ExactLimit("quadratic", {"strength": 0.005}),
            pathwise=True,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        at = objective.at(codes, differentiable=True)
        direction = self._direction(layer, potentials, at.slope())
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        return carry_back(codes, logits, lambda slope: self._direction(layer, potentials, slope)), codes

    def _direction(self, layer: LatentLayer, potentials: Tensor, slope: Tensor) -> Tensor:
        return difference(layer.argmax, potentials, slope, self.strength, "central")
