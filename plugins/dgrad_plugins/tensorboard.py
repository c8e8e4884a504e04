"""Writes a run's evaluations for TensorBoard: `dgrad train --plugin dgrad_plugins.tensorboard` (extra `tensorboard`).

Not among the built-in names: it is loaded on demand, like anybody's plugin, and needs nothing but the training hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dgrad

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise dgrad.InputError("TensorBoard is not installed; get it with: pip install 'dgrad[tensorboard]'") from error


@dgrad.hookimpl
def dgrad_evaluation_end(run: Path, metrics: Mapping[str, Any]) -> None:
    """One event file for each evaluation, so that none is lost when the run is killed."""
    with SummaryWriter(log_dir=str(run / "tensorboard")) as writer:
        for name, value in metrics.items():
            if name not in ("epoch", "step"):
                writer.add_scalar(name, value, metrics["step"])
