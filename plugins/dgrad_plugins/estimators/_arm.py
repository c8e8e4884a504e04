"""The augment-REINFORCE-merge estimator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_binary_rows
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._binary import antithetic_bits, binary_codes, binary_direction, log_odds


class AugmentReinforceMerge(GradientEstimator):
    """ARM: the loss at two antithetic codes, times the uniform numbers behind both.

    `[f(1{u > sig(-phi)}) - f(1{u < sig(phi)})] (u - 1/2)` for all variables at once. u is uniform, `phi` the log-odds.
    The mean over S independent u.

    Shapes: logits `[B, n, 2]`, loss `[B]`, codes `[2 S, B, n, 2]`: first one code of each pair, then the other. All
    are samples of `q`. The loss is their mean.

    Bias: none. Binary variables only. `disarm` is its mean over what u leaves open: never worse.

    Cost: 2 S evaluations of any objective.

    Reference: Yin & Zhou 2019, ARM: augment-REINFORCE-merge gradient for stochastic binary networks.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("3x2"), torch.zeros(4, 3, 2, requires_grad=True)
    >>> estimate = dgrad.estimator("arm")(layer, logits, lambda codes: codes[..., 1].sum(-1))
    >>> bool((estimate.codes.sum(0) == 1).all())  # at even odds the two codes differ in every bit
    True
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
            reference="Yin & Zhou 2019",
            losses_of_sites=True,
            why_unsupported=needs_binary_rows("arm"),
            one_pass=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        uniform, bits = antithetic_bits(log_odds(logits), self.samples, generator=generator)  # [S, B, n], [2 S, B, n]
        return Drawn(binary_codes(bits, logits.dtype), (uniform,))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        (uniform,) = drawn.kept  # [S, B, n]
        with torch.no_grad():
            up, down = loss.chunk(2)  # [S, B]
            # [f(1{u > sig(-phi)}) - f(1{u < sig(phi)})] (u - 1/2)
            gradient = (up - down).unsqueeze(-1) * (uniform - 0.5)  # [S, B, n]
            direction = binary_direction(gradient).repeat(2, 1, 1, 1)
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=drawn.codes)
