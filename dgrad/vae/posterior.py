"""What an encoder says of images: the code's logits and, in a mixed model, Gaussian variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dgrad.data import Batch


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian variables for each example: mean and log-variance, both `[B, c]`.

    Their prior is the standard normal distribution.
    """

    mean: Float[Tensor, "batch c"]
    log_variance: Float[Tensor, "batch c"]

    def sample(self, *, generator: Generator | None = None) -> Float[Tensor, "batch c"]:
        """One draw for each example, differentiable in mean and log-variance.

        Reference:
            Kingma & Welling 2014, Auto-encoding variational Bayes: the reparameterisation.
        """
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


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """A batch of a training step with its posterior: what a plugin's loss gets.

    Attributes:
        batch: images, labels and their places in the training split; label -1 is unknown.
        seen: the images as the encoder saw them, after `--input-dropout`.
        posterior: the encoder's, with its gradient.
        known: which variables of the code are labelled; None without `--labels`.
        codes: their codes, zeros where the label is unknown; None without `--labels`.
        encode: the posterior of other images.
        generator: for every draw.
    """

    batch: Batch
    seen: Float[Tensor, "batch c h w"]
    posterior: Posterior
    known: Bool[Tensor, "batch n 1"] | None
    codes: Float[Tensor, "batch n k"] | None
    encode: Callable[[Tensor], Posterior]
    generator: Generator
