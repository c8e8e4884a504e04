"""The hooks of dgrad: all that a plugin can add.

A plugin is a module, or any object, with functions of these names, each marked `@dgrad.hookimpl`. It is published under
the entry-point group `dgrad` or named with `--plugin`. A function may leave out arguments that it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dgrad.config import TrainConfig
    from dgrad.core.gradient_estimator import GradientEstimator
    from dgrad.core.latent_layer import LatentLayer
    from dgrad.core.objectives import CodeLoss
    from dgrad.data import Batch, Dataset
    from dgrad.vae.model import DiscreteVAE

hookspec = pluggy.HookspecMarker("dgrad")
hookimpl = pluggy.HookimplMarker("dgrad")

Function = TypeVar("Function", bound=Callable[..., Any])


def recordable(function: Function) -> Function:
    """Mark a hook, or a loss's class, that a GPU may record and replay.

    Its Python code then runs once, not at every step: what it gives must depend on its tensors alone.
    """
    function.recordable = True  # type: ignore[attr-defined]
    return function


@hookspec
def dgrad_register_estimators(register: Callable[[str, Callable[..., GradientEstimator]], None]) -> None:
    """Call `register(name, factory)` for each estimator; the factory's keywords are its hyper-parameters."""


@hookspec
def dgrad_register_latents(register: Callable[[str, Callable[[str], LatentLayer]], None]) -> None:
    """Call `register(name, parse)` for each latent; `parse` reads what follows `name:` in a spec."""


@hookspec
def dgrad_register_datasets(register: Callable[[str, Callable[[Path], Dataset]], None]) -> None:
    """Call `register(name, load)` for each data set; `load` gets the data root."""


@hookspec
def dgrad_register_models(register: Callable[[str, Callable[..., DiscreteVAE]], None]) -> None:
    """Call `register(name, factory)`: `factory(layer, image_shape, likelihood, hidden[, gaussian, dropout])`."""


@hookspec(firstresult=True)
def dgrad_label_images(
    images: Tensor, index: Tensor, labels: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor] | None:
    """Which training images get which labels, `(index, labels)`, given the few that are known; or None."""


@hookspec
def dgrad_code_losses(batch: Batch, config: TrainConfig) -> CodeLoss | None:
    """A loss of a batch's codes, `[S, B, *code] -> [S, B]`, to add to the objective; or None."""


@hookspec
def dgrad_batch_losses(
    model: DiscreteVAE, labels: Tensor | None, config: TrainConfig
) -> Mapping[str, nn.Module] | None:
    """Named losses for a run, modules from an `EncodedBatch` to nats an image; or None."""


@hookspec
def dgrad_train_start(run: Path, config: TrainConfig) -> None:
    """Called once before the first step of a run, a resumed one too."""


@hookspec
def dgrad_evaluation_end(run: Path, metrics: Mapping[str, Any]) -> None:
    """Called after each evaluation, with the line that `metrics.jsonl` got."""


@hookspec
def dgrad_train_end(run: Path, summary: Mapping[str, Any]) -> None:
    """Called once after the last step, with the content of `summary.json`."""
