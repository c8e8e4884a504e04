"""The straight-through estimator."""

from __future__ import annotations

from torch import Generator, Tensor

from dgrad import ExactLimit, GradientEstimator, LatentLayer, Schedule, Traits, add_gradient
from dgrad.core.estimator_tools import check_count
from dgrad.core.latent_layer import Logits
from dgrad.core.schedules import Constant


class StraightThrough(GradientEstimator):
    """Straight-through: a hard code forward, the Jacobian of its mean backward.

    `J(softmax(phi / tau)) h / tau`. `h` is the gradient of `f` at the code, `tau` the temperature, `J(q) = diag(q) - q
    q^T`.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: `f` is replaced by its first-order expansion: at temperature 1 it is exact for linear objectives alone. Low
    variance. Codes drawn at a forward temperature other than 1 (decoupled straight-through) are not samples of `q`:
    then the loss's value is biased too.

    Cost: S evaluations and one backward pass.

    Reference: Bengio, Léonard & Courville 2013 (arXiv 1308.3432); two temperatures: Shah et al. 2024, Improving
    discrete optimisation via decoupled straight-through Gumbel-softmax.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("straight-through")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    temperature: Tensor
    forward_temperature: Tensor

    def __init__(
        self, temperature: float | Schedule = 1.0, samples: int = 1, forward_temperature: float | Schedule = 1.0
    ) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.hyperparameter("forward_temperature", forward_temperature, above=0)
        self.samples = check_count("samples", samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Bengio et al. 2013; Shah et al. 2024",
            unbiased_value=self.schedules["forward_temperature"] == Constant(1.0),
            limit=ExactLimit("linear", {"temperature": 1.0}),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = layer.sample(logits / self.forward_temperature, self.samples, generator=generator)  # [S, B, *code]
        # The Jacobian of E[z] at phi / tau: J(softmax(phi / tau)) / tau
        return add_gradient(codes, layer.mean(logits / self.temperature)), codes
