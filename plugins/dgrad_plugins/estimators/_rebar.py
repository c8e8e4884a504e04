"""REBAR."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Schedule, Traits
from dgrad.core.estimator_tools import check_count, check_flag, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._relaxed_control_variate import draw_codes_and_noise, relaxed_control_variate


class Rebar(GradientEstimator):
    """REBAR: REINFORCE with the loss at relaxed codes as its control variate.

    `(f(z) - eta c(zt)) (z - p) + eta d/dphi [c(zeta) - c(zt)]`, with `zeta = log p + G`, `z = argmax zeta`, and `zt`
    drawn as `zeta` given `z`. `c(u) = f(softmax(u / tau))`, all rows relaxed at once. `eta` and the temperature `tau`
    learn by lowering the squared norm of the gradient: two factors, which start at 1, multiply the values or schedules
    given. With `learn=False` the given values stand. `eta = 0` is REINFORCE without a baseline.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: none, at any `eta` and `tau`. Low variance where the loss at relaxed codes is like the loss.

    Cost: 3 S evaluations and a backward pass through the objective, differentiated once more to learn `tau`.

    Reference: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein 2017, REBAR: low-variance, unbiased gradient estimates
    for discrete latent variable models (arXiv 1703.07370).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimator = dgrad.estimator("rebar")
    >>> estimate = estimator(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> bool((estimate.loss == estimate.codes[0, ..., 0].sum(-1)).all()), estimator.traits.evaluations(layer)
    (True, 3)
    """

    temperature: Tensor
    eta: Tensor
    log_factors: Tensor

    def __init__(
        self, temperature: float | Schedule = 0.5, eta: float | Schedule = 1.0, learn: bool = True, samples: int = 1
    ) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.hyperparameter("eta", eta)
        self.samples = check_count("samples", samples)
        self.learn = check_flag("learn", learn)
        # The logarithms of the factors on temperature and eta: positive whatever the optimizer does.
        if learn:
            self.log_factors = nn.Parameter(torch.zeros(2))
        else:
            self.register_buffer("log_factors", torch.zeros(2), persistent=False)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=True,
            evaluations=lambda layer: 3 * self.samples,
            reference="Tucker et al. 2017",
            why_unsupported=needs_one_hot_rows("rebar"),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        def surrogate(potentials: Tensor) -> Tensor:
            temperature, eta = torch.stack([self.temperature, self.eta]) * self.log_factors.exp()
            # eta f(softmax(u / tau))
            return eta * objective(layer.relax(potentials, temperature))

        drawn = draw_codes_and_noise(layer, logits, self.samples, generator=generator)
        loss = objective(drawn.codes)  # [S, B]
        return relaxed_control_variate(layer, logits, drawn, loss, surrogate, [self.log_factors])
