"""ARMS: several antithetic samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_binary_rows
from dgrad.core.latent_layer import Logits
from dgrad.core.random import gumbel
from dgrad.core.weights import leave_one_out
from dgrad_plugins.estimators._binary import binary_codes, binary_direction, log_odds

SURELY_INDEPENDENT = -80.0
"""Log-odds below which `1 - rho` is 1 to the last digit, and still a quotient of normal numbers in float32."""


class AntitheticSamples(GradientEstimator):
    """ARMS: leave-one-out over antithetic samples, corrected for their correlation.

    `sum_m (f_m - mean f) (b_m - p) / ((S - 1) (1 - rho))`. p is the probability of each bit, rho the correlation of two
    of its S samples. `b_m = 1{d_m < 1 - (1 - p)^(1 / (S - 1))}`, with d uniform on the simplex, drawn for each
    variable. Each b_m is a sample of `q`. Two are 1 together with probability `2p - 1 + max(0, 2 (1 - p)^(1 / (S - 1))
    - 1)^(S - 1)`.

    Shapes: logits `[B, n, 2]`, loss `[B]`, codes `[S, B, n, 2]`.

    Bias: none, whatever the probabilities: nothing is clamped. Binary variables only. With 2 samples it is `disarm`.

    Cost: S >= 2 evaluations of any objective.

    Reference: Dimitriev & Zhou 2021, ARMS: antithetic-REINFORCE-multi-sample gradient for binary variables.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("3x2"), torch.zeros(4, 3, 2, requires_grad=True)
    >>> estimate = dgrad.estimator("arms", samples=3)(layer, logits, lambda codes: codes[..., 1].sum(-1))
    >>> estimate.codes.shape
    torch.Size([3, 4, 3, 2])
    """

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self.samples,
            reference="Dimitriev & Zhou 2021",
            losses_of_sites=True,
            why_unsupported=needs_binary_rows("arms"),
            one_pass=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        phi = log_odds(logits)  # [B, n]
        # d = E / sum E with E ~ Exp(1), that is -log E Gumbel
        simplex = (-gumbel(phi, self.samples, generator=generator)).softmax(0)  # [S, B, n]
        # b = 1{d <= 1 - (1 - p)^(1 / (S - 1))}
        threshold = -torch.expm1(F.logsigmoid(-phi) / (self.samples - 1))
        return Drawn(binary_codes(simplex <= threshold, logits.dtype))  # [S, B, n, 2]

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        phi, codes = log_odds(logits), drawn.codes  # [B, n], [S, B, n, 2]
        with torch.no_grad():
            # (f_m - mean f) S / ((S - 1) (1 - rho)) (b_m - p)
            score = codes[..., 1] - torch.sigmoid(phi)  # [S, B, n]
            gradient = leave_one_out(loss).unsqueeze(-1) * score * inverse_decorrelation(phi, self.samples)
        return Estimate(loss=replace_gradient(loss, logits, binary_direction(gradient)).mean(0), codes=codes)


def inverse_decorrelation(phi: Tensor, samples: int) -> Tensor:
    """`1 / (1 - rho) = p (1 - p) / (p - P11)` without cancellation. P11 is the probability of two 1s."""
    phi = phi.clamp_min(SURELY_INDEPENDENT)
    a = F.logsigmoid(-phi) / (samples - 1)  # log (1 - p)^(1 / (S - 1))
    # P11 = 2p - 1 + max(0, 2 e^a - 1)^(S - 1), so that (p - P11) / (1 - p) = 1 - (max(0, 2 e^a - 1) / e^a)^(S - 1).
    # The logarithm of that power is -inf where the maximum is 0, and the quotient then exactly p.
    log_power = (samples - 1) * (torch.log1p((2 * torch.expm1(a)).clamp_min(-1)) - a)
    return -torch.sigmoid(phi) / torch.expm1(log_power)
