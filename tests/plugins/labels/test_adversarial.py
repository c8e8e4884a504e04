"""The virtual adversarial loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrad_plugins.labels._adversarial import adversarial_change


def test_the_adversarial_change_of_a_linear_encoder_is_the_worst_one() -> None:
    """The divergence of two classes grows with the change of one difference of logits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    images = torch.rand(5, 1, 3, 4, generator=generator, dtype=torch.float64)

    def logits_of(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight.T).view(-1, 1, 2)

    radius, logits = 0.7, logits_of(images)
    loss = adversarial_change(logits_of, images, logits, radius, generator=generator)
    q, difference = logits.softmax(-1), weight[0] - weight[1]
    along = radius * (difference / difference.norm()).view(1, 1, 3, 4)
    ways = torch.stack(
        [(q * (q.log() - logits_of(images + sign * along).log_softmax(-1))).sum((1, 2)) for sign in (1, -1)]
    )
    assert ways.amin(0).mean() - 1e-9 <= loss <= ways.amax(0).mean() + 1e-9
    around = torch.randn(200, 1, 3, 4, generator=generator, dtype=torch.float64)
    around = radius * around / around.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    divergences = [(q * (q.log() - logits_of(images + change).log_softmax(-1))).sum((1, 2)).mean() for change in around]
    assert max(divergences) < loss, "no random change of that norm is as bad"
