"""The straight-through Gumbel-softmax, Rao-Blackwellised."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import ExactLimit, GradientEstimator, LatentLayer, Schedule, Traits, add_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import log_softmax
from dgrad_plugins.estimators._conditional import conditional_potentials


class RaoStraightThroughGumbelSoftmax(GradientEstimator):
    """Straight-through Gumbel-softmax, averaged over the noise given the code.

    `mean over m of J(softmax((phi + G_m) / tau)) h / tau`. The `inner_samples` draws of `G` have `argmax(phi + G) = z`.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: that of `st-gumbel-softmax`, its mean being the same, with less variance. As the temperature falls it becomes
    exact for quadratic objectives.

    Cost: S evaluations and one backward pass, however many inner samples.

    Reference: Paulus, Maddison & Krause 2021, Rao-Blackwellizing the straight-through Gumbel-softmax gradient estimator
    (arXiv 2010.04838).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("rao-st-gumbel-softmax")(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> bool((estimate.loss == estimate.codes[0, ..., 0].sum(-1)).all())
    True
    """

    temperature: Tensor

    def __init__(self, temperature: float | Schedule = 0.5, samples: int = 1, inner_samples: int = 10) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.samples = check_count("samples", samples)
        self.inner_samples = check_count("inner_samples", inner_samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Paulus et al. 2021",
            why_unsupported=needs_one_hot_rows("rao-st-gumbel-softmax"),
            limit=ExactLimit("quadratic", {"temperature": 0.005}),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        with torch.no_grad():
            potentials = conditional_potentials(
                log_softmax(logits), codes, self.inner_samples, generator=generator
            )  # [inner, S, B, n, k]
        # Given the code the noise depends on the logits. As in the plain straight-through it counts as a constant.
        soft = layer.relax(add_gradient(potentials, logits), self.temperature).mean(0)  # [S, B, n, k]
        return add_gradient(codes, soft), codes
