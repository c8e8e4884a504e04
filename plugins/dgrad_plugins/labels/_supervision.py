"""The losses of the logits with few labels: cross-entropy, class balance and independence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import dgrad
from dgrad.config import TrainConfig
from dgrad.core.latent_layer import LatentLayer
from dgrad.kernels.numerics import log_softmax
from dgrad.vae.posterior import EncodedBatch

MEMORY = 0.9
"""How much of a moving mean stays from step to step."""
INDEPENDENCE_OF_ATTRIBUTES = 1000.0
"""The weight of the independence where the code's variables are attributes and nothing else is said."""


def label_frequencies(labels: Int[Tensor, "images n"], values: int) -> Float[Tensor, "n values"]:
    """How frequent each value of each variable is among labels, with one more of each, so that none is 0."""
    counts = F.one_hot(labels, values).sum(0) + 1.0
    return counts / counts.sum(-1, keepdim=True)


@dgrad.recordable
class Supervision(nn.Module):
    """The cross-entropy of labelled images, the balance of classes, and independence of the code.

    - Balance: `weight * sum m log(m / f)` over the values of each variable, the KL between m and frequencies f. Here m
      is a moving mean of `q` over the unlabelled images. Its gradient is that of the batch's mean. Without the
      balance, classes merge.
    - Independence: `weight / 2 * sum C^2`. C are the covariances between the values of the code's variables and the
      means of the Gaussian variables. They move like m. Without the independence, the Gaussian variables repeat the
      code, and no attribute can be switched.

    Args:
        frequencies: f, `[n, k]`; equal by default, for classes with equally many labelled images.

    Reference:
        Cheung, Livezey, Bansal & Olshausen 2014, Discovering hidden factors of variation in deep networks
        (arXiv 1412.6583): XCov, the independence.
    """

    mean: Tensor
    frequencies: Tensor
    covariance: Tensor

    def __init__(
        self, config: TrainConfig, layer: LatentLayer, frequencies: Tensor | None = None, gaussian: int = 0
    ) -> None:
        super().__init__()
        self.label_weight = config.label_weight if config.label_loss == "cross-entropy" else 0.0
        self.balance_weight = config.balance_weight
        weight = config.independence_weight
        if weight is None:
            weight = INDEPENDENCE_OF_ATTRIBUTES if config.attributes else 0.0
        self.independence_weight = weight if gaussian else 0.0
        if self.independence_weight > 0:
            self.register_buffer("covariance", torch.zeros(*layer.shape, gaussian))
        equal = torch.full(layer.shape, 1 / layer.shape[-1])
        self.register_buffer("mean", equal if frequencies is None else frequencies.clone())
        self.register_buffer("frequencies", equal.clone() if frequencies is None else frequencies, persistent=False)

    def forward(self, encoded: EncodedBatch) -> Float[Tensor, ""]:
        """The loss of a batch, the mean over its images, in nats."""
        known, codes, gaussian = encoded.known, encoded.codes, encoded.posterior.mean
        assert known is not None and codes is not None
        log_q = log_softmax(encoded.posterior.logits)
        loss = -self.label_weight * (codes * log_q).sum((-2, -1)).mean()
        if self.balance_weight > 0:
            loss = loss + self.balance_weight * self._balance(log_q.exp(), known)
        if self.independence_weight > 0 and gaussian is not None:
            values = torch.where(known, codes, log_q.exp()).detach()  # the code stays what it is
            loss = loss + self.independence_weight * self._dependence(values, gaussian)
        return loss

    def _dependence(self, values: Tensor, gaussian: Tensor) -> Tensor:
        covariance = torch.einsum("bnk,bg->nkg", values - values.mean(0), gaussian - gaussian.mean(0)) / len(values)
        with torch.no_grad():
            self.covariance.mul_(MEMORY).add_(covariance, alpha=1 - MEMORY)
        # d sum C^2 / 2 = sum C dC
        return (self.covariance * covariance).sum()

    def _balance(self, q: Tensor, known: Tensor) -> Tensor:
        unknown = (~known).to(q.dtype)  # [B, n, 1]
        batch_mean = (unknown * q).sum(0) / unknown.sum(0).clamp_min(1)  # [n, k]
        with torch.no_grad():
            self.mean.mul_(MEMORY).add_(batch_mean, alpha=1 - MEMORY)
        # d sum m log m = sum log m dm, as the changes of m add up to 0; a class that nothing has stays finite
        return (batch_mean * (self.mean.clamp_min(1e-9) / self.frequencies).log()).sum()
