"""The Gumbel-softmax relaxation."""

from __future__ import annotations

from torch import Generator, Tensor

from dgrad import ExactLimit, GradientEstimator, LatentLayer, Schedule, Traits
from dgrad.core.estimator_tools import check_alpha, check_count, needs_relaxation, relaxed
from dgrad.core.latent_layer import Logits


class GumbelSoftmax(GradientEstimator):
    """Gumbel-softmax: the argmax of the perturbed logits relaxed to a softmax.

    The gradient of `f(softmax((phi + G) / tau))`, `tau` the temperature. With
    `alpha` above 1, up to 2, alpha-entmax takes the place of the softmax: 2 is sparsemax. Relaxed codes then have exact
    zeros, and most rows are one-hot long before the temperature is low.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`. The objective is evaluated at relaxed codes.

    Bias: O(tau), in the value too, whatever alpha. As the temperature falls it becomes exact for any smooth objective.
    The variance is ~ 1/tau.

    Cost: S evaluations and one backward pass.

    Reference: Jang, Gu & Poole 2016 (arXiv 1611.01144); Maddison, Mnih & Teh 2016 (arXiv 1611.00712). Sparse
    relaxations: Martins & Astudillo 2016 (arXiv 1602.02068); Peters, Niculae & Martins 2019 (arXiv 1905.05702).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimator = dgrad.estimator("gumbel-softmax", temperature=0.5)
    >>> estimate = estimator(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.loss.shape
    torch.Size([4])
    """

    temperature: Tensor

    def __init__(self, temperature: float | Schedule = 0.5, samples: int = 1, alpha: float = 1.0) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.samples = check_count("samples", samples)
        self.alpha = check_alpha(alpha)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Jang et al. 2016; Maddison et al. 2016",
            why_unsupported=needs_relaxation("gumbel-softmax", self.alpha),
            unbiased_value=False,
            limit=ExactLimit("any", {"temperature": 0.005}),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        potentials = logits + layer.noise(logits, self.samples, generator=generator)  # [S, B, *code]
        # f(softmax((phi + G) / tau))
        return relaxed(layer, potentials, self.temperature, self.alpha), layer.argmax(potentials.detach())
