"""ReinMax with the Jacobian of a Rao-Blackwellised Gumbel-softmax."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import GradientEstimator, LatentLayer, Schedule, Traits, add_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import jacobian_product, softmax
from dgrad_plugins.estimators._conditional import conditional_potentials


class ReinMaxRao(GradientEstimator):
    """ReinMax-Rao: ReinMax whose first Jacobian is averaged over Gumbel noise, given the code.

    `[2 mean over m of J(softmax((log pi + G_m) / tau)) / tau - J(p) / 2] h`. `p = softmax(phi)`, `pi = (p + z) / 2`,
    and `h` is the gradient of `f` at the code. The `inner_samples` draws of `G` have `argmax(log pi + G) = z`.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: exact for no objective, linear ones included. `reinmax` is exact for quadratic ones.

    Cost: S evaluations and one backward pass, however many inner samples.

    Reference: Wang & Bui 2026, Beyond ReinMax: low-variance gradient estimators for discrete latent variables (arXiv
    2603.08257). The second term is at `p`, as in their code.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("reinmax-rao")(layer, logits, lambda codes: codes[..., 0].sum(-1))
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
            reference="Wang & Bui 2026",
            why_unsupported=needs_one_hot_rows("reinmax-rao"),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        with torch.no_grad():
            p = layer.mean(logits)  # [B, n, k]
            middle = ((p + codes) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
            potentials = conditional_potentials(middle, codes, self.inner_samples, generator=generator)
            relaxed = softmax(potentials / self.temperature)  # [inner, S, B, n, k]
        # Linear in the logits, so that the gradient of `proxy . h` in phi is the bracket
        first = jacobian_product(relaxed, logits).mean(0) / self.temperature
        return add_gradient(codes, 2 * first - jacobian_product(p, logits) / 2), codes
