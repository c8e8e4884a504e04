"""The loss of the code that labels give, as a hook like anybody's (`--labels 100 --label-loss code`). May import torch and dgrad."""

from __future__ import annotations

import dgrad
from dgrad.config import TrainConfig
from dgrad.core.objectives import CodeLoss
from dgrad.data import Batch
from dgrad.training.labels import LabelObjective


@dgrad.hookimpl
@dgrad.recordable
def dgrad_code_losses(batch: Batch, config: TrainConfig) -> CodeLoss | None:
    """A cost for every known variable of the code that is not its label."""
    if config.labels == 0 or config.label_loss != "code" or batch.labels is None:
        return None
    return LabelObjective(config.label_weight, batch.labels)
