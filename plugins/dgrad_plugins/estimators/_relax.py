"""RELAX."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Objective, Schedule, Traits
from dgrad.core.estimator_tools import check_count, check_flag, layer_missing, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.core.sites import plain_shape
from dgrad_plugins.estimators._baselines import ScalarNetwork, read_average, update_average
from dgrad_plugins.estimators._relaxed_control_variate import draw_codes_and_noise, relaxed_control_variate


class Relax(GradientEstimator):
    """RELAX: REINFORCE with a learned control variate that sees the relaxed code.

    `(f(z) - c(zt)) (z - p) + d/dphi [c(zeta) - c(zt)]`, with `zeta = log p + G`, `z = argmax zeta` and `zt` drawn as
    `zeta` given `z`. `c(u) = b + r(softmax(u / tau))`: a network `r` with one hidden layer and the moving average `b`
    of earlier losses. `with_loss=True` has `c(u) = f(softmax(u / tau)) + r(softmax(u / tau))`: REBAR and what it
    misses. Network and `tau`, as a factor on the temperature given, learn by lowering the squared norm of the gradient.
    The network starts at 0.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: none, whatever the network.

    Cost: S evaluations of any objective. With the loss 3 S, of an objective that can be differentiated twice.

    Reference: Grathwohl, Choi, Wu, Roeder & Duvenaud 2018, Backpropagation through the void: optimizing control
    variates for black-box gradient estimation (arXiv 1711.00123).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimator = dgrad.estimator("relax")
    >>> estimator.set_layer(layer)
    >>> estimate = estimator(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> bool((estimate.loss == estimate.codes[0, ..., 0].sum(-1)).all()), estimator.traits.evaluations(layer)
    (True, 1)
    """

    temperature: Tensor
    average: Tensor
    weight: Tensor
    network: ScalarNetwork | None

    def __init__(
        self, temperature: float | Schedule = 0.5, hidden: int = 100, with_loss: bool = False, samples: int = 1
    ) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.hidden = check_count("hidden", hidden)
        self.with_loss = check_flag("with_loss", with_loss)
        self.samples = check_count("samples", samples)
        self.log_factor = nn.Parameter(torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))
        self.network = None

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=self.with_loss,
            evaluations=lambda layer: (3 if self.with_loss else 1) * self.samples,
            reference="Grathwohl et al. 2018",
            why_unsupported=needs_one_hot_rows("relax"),
            one_pass=not self.with_loss,
        )

    def set_layer(self, layer: LatentLayer) -> None:
        self.network = ScalarNetwork(plain_shape(layer), self.hidden)

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        drawn = self.draw_codes(layer, logits, generator=generator)
        loss = objective(drawn.codes)  # [S, B]
        if not self.with_loss:
            return self.estimate_from(layer, logits, drawn, loss)
        return self._estimate(layer, logits, drawn, loss, objective)

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        drawn = draw_codes_and_noise(layer, logits, self.samples, generator=generator)
        # As it is now: losses that arrive before this draw's own may depend on the draw.
        average = read_average(self.average, self.weight).to(logits.dtype)
        return Drawn(drawn.codes, (*drawn.kept, average.expand(1, len(logits))))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        average = drawn.kept[-1]  # [1, B]
        # A loss of hundreds of nats is out of a new network's reach: the average, or the loss, carries its level.
        estimate = self._estimate(layer, logits, drawn, loss, lambda relaxed: average)
        if self.learning():
            update_average(self.average, self.weight, estimate.loss)
        return estimate

    def _estimate(
        self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor, level: Callable[[Tensor], Tensor]
    ) -> Estimate:
        network = self.network
        if network is None:
            raise layer_missing("relax")

        def surrogate(potentials: Tensor) -> Tensor:
            relaxed = layer.relax(potentials, self.temperature * self.log_factor.exp())
            return level(relaxed) + network(relaxed)

        parameters = [self.log_factor, *network.parameters()]
        return relaxed_control_variate(layer, logits, drawn, loss, surrogate, parameters)
