"""The pictures that each run keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Generator

from dgrad.data import Split
from dgrad.errors import DgradError
from dgrad.experiments.experiment import Experiment
from dgrad.pictures.image_grids import save_reconstructions, save_samples
from dgrad.pictures.plots import save_curves, save_usage
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.usage import code_usage

RUN_PICTURES = ("reconstructions.png", "samples.png", "curves.png", "code.png")


def save_run_pictures(run: Run, model: DiscreteVAE, test: Split) -> None:
    """Write the curves, samples, reconstructions and use of the code of a finished run.

    Args:
        model: with the best weights, on the device of the images.
        test: the test images as they are evaluated.
    """
    config = run.config
    title = f"{config.estimator}, {config.latent}, {Path(config.dataset).name}"
    save_curves(run.path / "curves.png", run.metrics(), model.likelihood.unit, title)
    generator = Generator(test.images.device).manual_seed(config.seed)
    save_samples(run.path / "samples.png", model, generator=generator)
    save_reconstructions(run.path / "reconstructions.png", model, test)
    save_usage(run.path / "code.png", code_usage(model, test, generator=None).variables, title)


def draw_missing_pictures(run: Run) -> None:
    """Write the pictures of a finished run whose process ended before it wrote them."""
    if not all((run.path / name).is_file() for name in RUN_PICTURES):
        model, _ = load_model(run)
        save_run_pictures(run, model, Build(run.config).evaluation_data.test)


def draw_missing_of(experiments: Iterable[Experiment], tell: Callable[[str], object]) -> None:
    """Write the missing pictures of those that are finished; `tell` hears why a run gets none."""
    for run in (Run(experiment.path) for experiment in experiments if experiment.state == "finished"):
        try:
            draw_missing_pictures(run)
        except DgradError as error:
            tell(f"{run.path} gets no pictures: {error}")
