"""The virtual adversarial loss: an image and its worst small change are to have the same code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

import dgrad
from dgrad.kernels.numerics import log_softmax
from dgrad.vae.posterior import EncodedBatch

PROBE = 0.1
"""The norm of the change from which the search for the worst direction starts; float32 still resolves it."""


@dgrad.recordable
class AdversarialLoss(nn.Module):
    """`weight` times the virtual adversarial loss of a batch, see `adversarial_change`."""

    def __init__(self, weight: float, radius: float) -> None:
        super().__init__()
        self.weight = weight
        self.radius = radius

    def forward(self, encoded: EncodedBatch) -> Float[Tensor, ""]:
        def logits_of(images: Tensor) -> Tensor:
            return encoded.encode(images).logits

        logits, generator = encoded.posterior.logits, encoded.generator
        return self.weight * adversarial_change(logits_of, encoded.seen, logits, self.radius, generator=generator)


def adversarial_change(
    logits_of: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch c h w"],
    logits: Float[Tensor, "batch n k"],
    radius: float,
    *,
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    """`KL(q(x) || q(x + r))`, r the worst change of norm `radius`.

    One step of the power method from a random direction finds r. Both r and q(x) are held.

    Returns:
        The mean over the images, in nats.

    Reference:
        Miyato, Maeda, Koyama & Ishii 2018, Virtual adversarial training (arXiv 1704.03976).
    """
    log_q = log_softmax(logits.detach())

    def divergence(change: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_softmax(logits_of(images + change)))).sum((-2, -1)).mean()

    direction = torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)
    small = _of_norm(direction, PROBE).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(divergence(small), small)
    return divergence(_of_norm(slope, radius))


def _of_norm(change: Tensor, norm: float) -> Tensor:
    """Each image's change, scaled to a Euclidean norm."""
    length = change.flatten(1).norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
    return norm * change / length.view(-1, *[1] * (change.ndim - 1))
