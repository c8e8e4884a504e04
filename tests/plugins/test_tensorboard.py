"""The TensorBoard plugin, loaded on demand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dgrad.registry import load_plugin, registry
from dgrad.training.run_directory import Run


def test_evaluations_reach_tensorboard(train: Callable[..., Run]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plugin = load_plugin("dgrad_plugins.tensorboard")
    try:
        run = train(epochs=3)
    finally:
        registry().remove(plugin.module)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("valid_bound")]
    assert written == [(line["step"], pytest.approx(line["valid_bound"])) for line in run.metrics()]
