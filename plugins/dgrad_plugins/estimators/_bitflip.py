"""The exact difference along one random variable."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import needs_binary_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import one_hot
from dgrad_plugins.estimators._binary import binary_codes, binary_direction, log_odds


class BitFlip(GradientEstimator):
    """`leg` along one variable: a bit drawn at random is set to 1 and to 0.

    `n p_i (1 - p_i) [f(z, bit i = 1) - f(z, bit i = 0)]` for the log-odds of variable i, and 0 for the others. i is
    uniform over the n variables.

    Shapes: logits `[B, n, 2]`, loss `[B]`, codes `[1, B, n, 2]`. The loss is `p_i f(bit i = 1) + (1 - p_i) f(bit i =
    0)`.

    Bias: none. The variance grows with the number of variables. With one it is exact. Binary variables only.

    Cost: 2 evaluations of any objective, however many variables.

    Reference: the local expectation of Titsias & Lázaro-Gredilla 2015, subsampled; `bitflip-1` in Titsias & Shi 2022.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> estimate = dgrad.estimator("bitflip-1")(layer, logits, lambda codes: codes[..., 0, 1])
    >>> estimate.loss.sum().backward()
    >>> estimate.loss.item(), logits.grad
    (0.5, tensor([[[-0.2500,  0.2500]]]))
    """

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: 2,
            reference="Titsias & Lázaro-Gredilla 2015",
            why_unsupported=needs_binary_rows("bitflip-1"),
            one_pass=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        batch, n = logits.shape[:2]
        code = layer.sample(logits, generator=generator)  # [1, B, n, 2]
        row = torch.randint(n, (1, batch), device=logits.device, generator=generator)
        chosen = one_hot(row, n, torch.bool)  # [1, B, n]
        bits = code[..., 1] > 0.5
        flipped = binary_codes(torch.cat([bits | chosen, bits & ~chosen]), logits.dtype)  # [2, B, n, 2], at 1 and at 0
        return Drawn(flipped, (code, row))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        code, row = drawn.kept  # [1, B, n, 2], [1, B]
        phi = log_odds(logits)  # [B, n]
        n = phi.shape[1]
        p, q = ((sign * phi).gather(-1, row.T).sigmoid().squeeze(-1) for sign in (1, -1))  # [B]
        with torch.no_grad():
            # n p_i (1 - p_i) [f(bit i = 1) - f(bit i = 0)] e_i
            gradient = (n * p * q * (loss[0] - loss[1])).unsqueeze(-1) * one_hot(row[0], n, torch.bool)  # [B, n]
        # The expectation over bit i is taken in the value, too.
        mean = (p * loss[0] + q * loss[1]).unsqueeze(0)  # [1, B]
        return Estimate(loss=replace_gradient(mean, logits, binary_direction(gradient).unsqueeze(0))[0], codes=code)
