"""The model of a run, read back with the weights that training left."""

from __future__ import annotations

from typing import Any

from dgrad.errors import InputError
from dgrad.training.build import Build, build_model
from dgrad.training.checkpoint import damaged, load_checkpoint, load_state
from dgrad.training.run_directory import Run
from dgrad.vae.model import DiscreteVAE

PREFIXES = {"best": "best.", "last": "model."}
"""How the names of the weights begin in a checkpoint."""


def load_model(run: Run, weights: str = "best") -> tuple[DiscreteVAE, dict[str, Any]]:
    """The trained model on the CPU, and the state (epoch, step ...) that its weights are from.

    Args:
        weights: `best` by the validation figures, or `last`.

    Raises:
        InputError: the checkpoint is missing, damaged, of another model, or from before the first evaluation.
    """
    build = Build(run.config)
    tensors, state = load_checkpoint(run.checkpoint_file)
    try:
        channels, height, width = map(int, state["image_shape"])
        source = state["best"] if weights == "best" else {"epoch": state["epoch"], "step": state["step"]}
        trained = source is not None and source["step"] != 0
        source = {"weights": weights, **(source or {})}
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(run.checkpoint_file, error) from None
    if not trained:
        raise InputError(f"{run.path} has no trained weights yet; continue it with dgrad train --resume {run.path}")
    model = build_model(build.given, (channels, height, width), build.layer)
    load_state(model, tensors, PREFIXES[weights], run.checkpoint_file)
    model.eval()
    return model, source
