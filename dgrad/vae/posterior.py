"""What an encoder says of images: the logits of the code and, in a mixed model, Gaussian variables beside it. May import torch only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian variables for each example, under a standard normal prior: mean and log-variance, both `[B, c]`."""

    mean: Float[Tensor, "batch c"]
    log_variance: Float[Tensor, "batch c"]

    def sample(self, *, generator: Generator | None = None) -> Float[Tensor, "batch c"]:
        """One draw for each example, differentiable in mean and log-variance (the reparameterisation of Kingma & Welling 2014)."""
        noise = torch.randn(self.mean.shape, dtype=self.mean.dtype, device=self.mean.device, generator=generator)
        return self.mean + (self.log_variance / 2).exp() * noise

    def kl(self) -> Float[Tensor, " batch"]:
        """`KL(q || N(0, I))`, exact, in nats."""
        return (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).sum(-1) / 2

    def log_ratio(self, values: Float[Tensor, "batch c"]) -> Float[Tensor, " batch"]:
        """`log q(values) - log p(values)`, in nats; its mean under `q` is the KL."""
        standardised = (values - self.mean).square() / self.log_variance.exp()
        return (values.square() - standardised - self.log_variance).sum(-1) / 2


@dataclass(frozen=True)
class Posterior:
    """`q(z, c | x)` of a batch of images.

    Attributes:
        logits: `[B, *code]`, of the code z.
        gaussian: of the variables c, independent of z given x; None for a model whose only latent is the code.
    """

    logits: Float[Tensor, "batch *code"]
    gaussian: Gaussian | None = None

    def draw(self, *, generator: Generator | None = None) -> Float[Tensor, "batch c"] | None:
        """One draw of the Gaussian variables for each image; None where there are none."""
        return None if self.gaussian is None else self.gaussian.sample(generator=generator)

    @property
    def mean(self) -> Float[Tensor, "batch c"] | None:
        """The mean of the Gaussian variables; None where there are none."""
        return None if self.gaussian is None else self.gaussian.mean
