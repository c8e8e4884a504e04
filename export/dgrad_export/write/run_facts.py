"""What an export takes of a run besides its model: its data set, images to compare on, its figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgrad.config import TrainConfig
from dgrad.data import Dataset, unit
from dgrad.errors import InputError
from dgrad.training.build import build_dataset, evaluation_data
from dgrad.training.run_directory import Run
from dgrad.vae.model import DiscreteVAE
from dgrad_export.write.comparison import COUNT

SUMMARY_PART = {"best": "best", "last": "final"}
"""Where a run's summary has the figures of which weights."""


def run_figures(run: Run, weights: str) -> dict[str, Any]:
    """The test bound of these weights and its unit; empty where the run is not finished."""
    summary = run.summary() or {}
    bound = (summary.get(SUMMARY_PART[weights]) or {}).get("test_bound")
    return {} if bound is None else {"test_bound": bound, "unit": summary.get("unit")}


def run_dataset(config: TrainConfig, model: DiscreteVAE) -> Dataset | None:
    """The run's data set before binarisation; None where it cannot be loaded."""
    try:
        dataset = build_dataset(config)
    except Exception:  # a data set's loader may be anybody's; without one the export is still worth having
        return None
    if dataset.image_shape != model.image_shape:
        raise InputError(
            f"{config.dataset} now has images of shape {list(dataset.image_shape)} (channels, height, width); the run was "
            f"trained on {list(model.image_shape)}: put the data set of the run back, or move the other away"
        )
    return dataset


def comparison_images(config: TrainConfig, model: DiscreteVAE, dataset: Dataset | None) -> tuple[Tensor, str]:
    """What to compare on, `[256, C, H, W]` float32 in [0, 1], and a description."""
    if dataset is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(COUNT, *model.image_shape, generator=generator)
        if config.binarize in ("static", "dynamic"):
            images = images.round()
        return images, f"{COUNT} random images: the run's data set could not be loaded"
    # Where the encoder rounds, it gets grey images, as a client would send them.
    split = (dataset if config.binarize == "threshold" else evaluation_data(config, dataset)).test
    chosen = torch.arange(COUNT) % len(split)
    found = min(COUNT, len(split))
    return unit(split.images[chosen]), f"{COUNT} images, {found} of them different, of the run's test split"
