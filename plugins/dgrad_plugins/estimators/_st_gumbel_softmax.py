"""The straight-through Gumbel-softmax."""

from __future__ import annotations

from torch import Generator, Tensor

from dgrad import ExactLimit, GradientEstimator, LatentLayer, Schedule, Traits, add_gradient
from dgrad.core.estimator_tools import check_alpha, check_count, needs_relaxation, relaxed
from dgrad.core.latent_layer import Logits


class StraightThroughGumbelSoftmax(GradientEstimator):
    """Straight-through Gumbel-softmax: a hard code forward, a relaxed one backward.

    The gradient of `f(z + soft - stop(soft))`, with `z = argmax(phi + G)` and `soft = softmax((phi + G) / tau)`.
    With `alpha` above 1, up to 2, `soft` is alpha-entmax: 2 is sparsemax. Rows that are one-hot have no gradient then.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: O(tau), none in the value, the code being hard. As the temperature falls the Jacobian is zero but where two
    values tie. Either is the code half of the time. So the gradients of `f` at both make the trapezoidal rule for the
    difference of their losses, which is exact for quadratic objectives. The variance is ~ 1/tau.

    Cost: S evaluations and one backward pass.

    Reference: Jang, Gu & Poole 2016 (arXiv 1611.01144). Sparse relaxations: Martins & Astudillo 2016 (arXiv
    1602.02068); Peters, Niculae & Martins 2019 (arXiv 1905.05702).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimator = dgrad.estimator("st-gumbel-softmax", temperature=0.5)
    >>> estimate = estimator(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> bool((estimate.loss == estimate.codes[0, ..., 0].sum(-1)).all())
    True
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
            reference="Jang et al. 2016",
            why_unsupported=needs_relaxation("st-gumbel-softmax", self.alpha),
            perturbs=True,
            limit=ExactLimit("quadratic", {"temperature": 0.005}),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        potentials = logits + layer.noise(logits, self.samples, generator=generator)  # [S, B, *code]
        codes = layer.argmax(potentials.detach())
        soft = relaxed(layer, potentials, self.temperature, self.alpha)
        # z + soft - stop(soft), where the code stays exactly hard
        return add_gradient(codes, soft), codes
