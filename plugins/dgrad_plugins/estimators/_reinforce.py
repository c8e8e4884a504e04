"""REINFORCE, the score-function estimator, with its baselines."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Traits, add_gradient, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count, layer_missing, weighted
from dgrad.core.latent_layer import Logits
from dgrad.core.sites import plain_shape
from dgrad_plugins.estimators._baselines import ScalarNetwork, read_average, update_average

BASELINES = ("none", "moving-average", "input-dependent")


class Reinforce(GradientEstimator):
    """REINFORCE: the loss times the gradient of `log q`, less a baseline.

    `(f(z) - b) (z - E_q[z])`. The baseline has not seen the sample. It is 0, or the moving average of the losses of
    earlier steps (decay 0.99, corrected for its start), or that average plus a network of the logits, which stand for
    the input (NVIL). The network has one hidden layer of `hidden` units and learns by squared error. NVIL also divides
    by a moving standard deviation: left out, because the result is no longer the gradient.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: none. High variance. The average is a buffer and the network has parameters: both are in the state dict.

    Cost: S evaluations of any objective.

    Reference: Williams 1992; Glynn 1990; the network: Mnih & Gregor 2014, Neural variational inference and learning in
    belief networks (arXiv 1402.0030).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("reinforce")(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.loss.shape
    torch.Size([4])
    """

    average: Tensor
    weight: Tensor
    network: ScalarNetwork | None

    def __init__(self, samples: int = 1, baseline: str = "moving-average", hidden: int = 100) -> None:
        super().__init__()
        self.samples = check_count("samples", samples)
        self.baseline = check_choice("baseline", baseline, BASELINES)
        self.hidden = check_count("hidden", hidden)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))
        self.network = None

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: self.samples,
            reference="Williams 1992",
            one_pass=True,
            losses_of_sites=True,
        )

    def set_layer(self, layer: LatentLayer) -> None:
        super().set_layer(layer)
        if self.baseline == "input-dependent":
            self.network = ScalarNetwork(plain_shape(layer), self.hidden)

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, *code]
        # As it is now: losses that arrive before this draw's own may depend on the draw.
        average = read_average(self.average, self.weight).to(logits.dtype)
        return Drawn(codes, (average.expand(1, len(logits)),))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        (baseline,) = drawn.kept  # [1, B]
        if self.baseline == "input-dependent":
            if self.network is None:
                raise layer_missing('reinforce with baseline="input-dependent"')
            baseline = baseline + self.network(layer.free(logits.detach()))
        with torch.no_grad():
            # (f(z) - b) grad log q(z)
            direction = weighted(drawn.codes - layer.mean(logits), loss - baseline)
        estimate = replace_gradient(loss, logits, direction)
        if self.baseline == "input-dependent":
            # the baseline's own loss, (f(z) - b)^2
            estimate = add_gradient(estimate, (loss.detach() - baseline).square())
        if self.baseline != "none" and self.learning():
            update_average(self.average, self.weight, loss)
        return Estimate(loss=estimate.mean(0), codes=drawn.codes)
