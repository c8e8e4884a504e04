"""The pictures that each run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Generator

if TYPE_CHECKING:
    from dgrad.training.trainer import Trainer
from dgrad.pictures.image_grids import save_reconstructions, save_samples
from dgrad.pictures.plots import save_curves

RUN_PICTURES = ("reconstructions.png", "samples.png", "curves.png")


def save_run_pictures(trainer: Trainer, directory: Path, metrics: list[dict[str, Any]]) -> None:
    """Write `curves.png`, `samples.png` and `reconstructions.png` of a finished run."""
    config, model = trainer.config, trainer.model
    title = f"{config.estimator}, {config.latent}, {Path(config.dataset).name}"
    save_curves(directory / "curves.png", metrics, model.likelihood.unit, title)
    generator = Generator(trainer.device).manual_seed(config.seed)
    save_samples(directory / "samples.png", model, generator=generator)
    save_reconstructions(directory / "reconstructions.png", model, trainer.data.test)
