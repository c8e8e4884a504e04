"""The antithetic estimator DisARM, also known as U2G."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_binary_rows
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._binary import antithetic_bits, binary_codes, binary_direction, log_odds


class DisARM(GradientEstimator):
    """DisARM: ARM with the uniform numbers integrated out, given the two codes.

    `1/2 (f(b) - f(b')) (b - b') sig(|phi|)` for all variables at once. b and b' are antithetic, `phi` the log-odds.
    The mean over S independent pairs.

    Shapes: logits `[B, n, 2]`, loss `[B]`, codes `[2 S, B, n, 2]`: first one code of each pair, then the other. All
    are samples of `q`. The loss is their mean.

    Bias: none. Binary variables only. Less variance than `arm`.

    Cost: 2 S evaluations of any objective.

    Reference: Dong, Mnih & Tucker 2020, DisARM: an antithetic gradient estimator for binary latent variables; Yin, Ho,
    Yan, Qian & Zhou 2020, Probabilistic best subset selection via gradient-based optimization (there U2G).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("disarm")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.samples = check_count("samples", samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: 2 * self.samples,
            reference="Dong et al. 2020",
            losses_of_sites=True,
            why_unsupported=needs_binary_rows("disarm"),
            one_pass=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        _, bits = antithetic_bits(log_odds(logits), self.samples, generator=generator)  # [2 S, B, n]
        return Drawn(binary_codes(bits, logits.dtype))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        phi, codes = log_odds(logits), drawn.codes  # [B, n], [2 S, B, n, 2]
        with torch.no_grad():
            (first, second), (bits, antithetic) = loss.chunk(2), codes[..., 1].chunk(2)  # [S, B], [S, B, n]
            # 1/2 (f(b) - f(b')) (b - b') sig(|phi|)
            gradient = 0.5 * (first - second).unsqueeze(-1) * (bits - antithetic) * torch.sigmoid(phi.abs())
            direction = binary_direction(gradient).repeat(2, 1, 1, 1)
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=codes)
