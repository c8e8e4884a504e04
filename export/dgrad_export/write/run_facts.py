"""What an export takes of a run besides its model: its data set, images to compare on, its figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgrad.config import TrainConfig
from dgrad.core.restricted import Restricted
from dgrad.data import unit
from dgrad.errors import InputError
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.vae.model import DiscreteVAE
from dgrad_export.write.comparison import COUNT
from dgrad_export.write.graphs import code_shape

SUMMARY_PART = {"best": "best", "last": "final"}
"""Where a run's summary has the figures of which weights."""
TEST_FIGURES = ("test_bound", "test_bits_per_dimension", "test_psnr")
"""What a manifest has of them."""


def run_figures(run: Run, weights: str) -> dict[str, Any]:
    """Test figures of these weights, the bound's unit, and what the code is used for; empty of an unfinished run."""
    summary = run.summary() or {}
    part = summary.get(SUMMARY_PART[weights]) or {}
    figures = {"code": part["code"]} if "code" in part else {}
    if part.get("test_bound") is not None:
        figures |= {"unit": summary.get("unit")} | {name: part[name] for name in TEST_FIGURES if name in part}
    return figures


def run_data(config: TrainConfig, model: DiscreteVAE) -> Build | None:
    """What the run's configuration builds, its data set loaded; None where that cannot be loaded."""
    build = Build(config)
    try:
        shape = build.dataset.image_shape
    except Exception:  # a data set's loader may be anybody's; without one the export is still worth having
        return None
    if shape != model.image_shape:
        raise InputError(
            f"{config.dataset} now has images of shape {list(shape)} (channels, height, width); the run was trained on "
            f"{list(model.image_shape)}: put the data set of the run back, or move the other away"
        )
    return build


def model_shapes(model: DiscreteVAE) -> dict[str, Any]:
    """The manifest's facts of a model: its latent and its Gaussian variables."""
    layer, integers = model.layer, code_shape(model)
    values = layer.shape[-1] if layer.one_hot_rows and integers == layer.shape[:-1] else None
    shapes: dict[str, Any] = {"shape": list(layer.shape), "code_shape": list(integers), "values": values}
    if values is not None and isinstance(layer, Restricted):
        shapes["sizes"] = layer.allowed[0].sum(-1).tolist()
    return {"latent": {"spec": str(layer), **shapes}, "gaussian": model.gaussian}


def label_names(config: TrainConfig, build: Build | None) -> dict[str, Any]:
    """The names of the classes of the run's data set and of the run's attributes, None where there are none."""
    classes = None if build is None else build.dataset.classes
    return {"classes": classes and list(classes), "attributes": list(config.attributes) or None}


def comparison_images(config: TrainConfig, model: DiscreteVAE, build: Build | None) -> tuple[Tensor, str]:
    """What to compare on, `[256, C, H, W]` float32 in [0, 1], and a description."""
    if build is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(COUNT, *model.image_shape, generator=generator)
        if config.binarize in ("static", "dynamic"):
            images = images.round()
        return images, f"{COUNT} random images: the run's data set could not be loaded"
    # Where the encoder rounds, it gets grey images, as a client would send them.
    split = (build.dataset if config.binarize == "threshold" else build.evaluation_data).test
    chosen = torch.arange(COUNT) % len(split)
    found = min(COUNT, len(split))
    return unit(split.images[chosen]), f"{COUNT} images, {found} of them different, of the run's test split"
