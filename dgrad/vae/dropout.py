"""Dropout whose noise comes from a generator of the run's own."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from dgrad.core.random import drop


class Dropout(nn.Module):
    """Dropout that draws from its owner's generator: see `DiscreteVAE.set_generator`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.generator: Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate, generator=self.generator) if self.training else x
