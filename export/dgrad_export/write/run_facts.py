"""The facts of a run that an export needs besides the model: its data set, images to compare on, its figures."""

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
"""The part of a run's summary with the figures of these weights."""


def run_figures(run: Run, weights: str) -> dict[str, Any]:
    """The test bound of these weights and its unit. Empty where the run is not finished."""
    summary = run.summary() or {}
    bound = (summary.get(SUMMARY_PART[weights]) or {}).get("test_bound")
    return {} if bound is None else {"test_bound": bound, "unit": summary.get("unit")}


def run_dataset(config: TrainConfig, model: DiscreteVAE) -> Dataset | None:
    """The run's data set before binarisation. None where it cannot be loaded."""
    try:
        dataset = build_dataset(config)
    except Exception:  # anybody may have written the loader, and an export without a data set is still useful
        return None
    if dataset.image_shape != model.image_shape:
        raise InputError(
            f"{config.dataset} now has images of shape {list(dataset.image_shape)} (channels, height, width); "
            f"the run was trained on {list(model.image_shape)}: "
            "put the data set of the run back, or move the other away"
        )
    return dataset


def comparison_images(config: TrainConfig, model: DiscreteVAE, dataset: Dataset | None) -> tuple[Tensor, str]:
    """Images to compare on, `[256, C, H, W]` float32 in [0, 1], and a description of them."""
    if dataset is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(COUNT, *model.image_shape, generator=generator)
        if config.binarize in ("static", "dynamic"):
            images = images.round()
        return images, f"{COUNT} random images: the run's data set could not be loaded"
    # An encoder that rounds gets grey images, as from a client.
    split = (dataset if config.binarize == "threshold" else evaluation_data(config, dataset)).test
    chosen = torch.arange(COUNT) % len(split)
    found = min(COUNT, len(split))
    return unit(split.images[chosen]), f"{COUNT} images, {found} of them different, of the run's test split"
