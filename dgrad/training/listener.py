"""Who watches a training run. May import no torch, so that a display can be built before anything heavy is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrad.training.trainer import Trainer


class Listener:
    """What a training run tells whoever watches it. All methods do nothing here; override what you want to hear."""

    def started(self, trainer: Trainer) -> None:
        """Before the first step."""

    def pretrained(self, trainer: Trainer, step: int) -> None:
        """After each step of the pretraining, the first of which is 1; must be quick and must not touch tensors."""

    def stepped(self, trainer: Trainer) -> None:
        """After each step; must be quick and must not touch tensors."""

    def evaluated(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After each evaluation on the validation images."""
