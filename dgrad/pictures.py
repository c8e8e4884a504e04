"""Pictures of a run: grids of images and training curves. May import the core; PIL and matplotlib only inside functions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dgrad.data import Split, unit
from dgrad.errors import InputError
from dgrad.files import replacing
from dgrad.networks import DiscreteVAE

if TYPE_CHECKING:
    from dgrad.training import Trainer

CELL = 56
"""Smaller images are enlarged by a whole factor until their longer side has at least this many pixels, smoothly."""


def save_grid(path: Path, images: Tensor, *, pairs: bool = False) -> None:
    """Write images `[rows, columns, C, H, W]` in [0, 1] as one PNG.

    Args:
        pairs: keep rows two and two together, with a wider gap after each pair.

    Raises:
        InputError: the images have neither one channel nor three.
    """
    from PIL import Image

    rows, columns, channels, height, width = images.shape
    if channels not in (1, 3):
        raise InputError(f"cannot draw images of {channels} channels; expected 1 (grey) or 3 (colour)")
    factor = max(1, -(-CELL // max(height, width)))
    cells = (
        F.interpolate(images.flatten(0, 1), scale_factor=factor, mode="bicubic") if factor > 1 else images.flatten(0, 1)
    )
    cells = (cells.clamp(0, 1) * 255).round().to(torch.uint8).unflatten(0, (rows, columns))
    gap, wide_gap = 4, 16
    tops = [gap + row * (height * factor + gap) + (row // 2 * (wide_gap - gap) if pairs else 0) for row in range(rows)]
    canvas = torch.full((tops[-1] + height * factor + gap, gap + columns * (width * factor + gap), channels), 255)
    for row, top in enumerate(tops):
        for column in range(columns):
            left = gap + column * (width * factor + gap)
            canvas[top : top + height * factor, left : left + width * factor] = cells[row, column].permute(1, 2, 0)
    pixels = canvas.to(torch.uint8).numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(temporary, format="PNG")


@torch.no_grad()
def prior_samples(model: DiscreteVAE, count: int, *, generator: Generator) -> Tensor:
    """`[count, C, H, W]` expected images of codes drawn from the uniform prior."""
    logits = torch.zeros(1, *model.layer.shape, device=generator.device)
    codes = model.layer.sample(logits, count, generator=generator).squeeze(1)
    return model.decode(codes)


@torch.no_grad()
def reconstructions(model: DiscreteVAE, images: Tensor) -> Tensor:
    """`[N, C, H, W]` expected images of the most probable code of each image."""
    return model.decode(model.layer.argmax(model.encoder(images)))


def save_samples(path: Path, model: DiscreteVAE, *, generator: Generator, rows: int = 8, columns: int = 12) -> None:
    """Write a grid of prior samples."""
    save_grid(path, prior_samples(model, rows * columns, generator=generator).unflatten(0, (rows, columns)).cpu())


def save_reconstructions(path: Path, model: DiscreteVAE, split: Split, *, rows: int = 4, columns: int = 12) -> None:
    """Write pairs of rows: images of the split, and below each what its most probable code decodes to."""
    count = min(rows * columns, len(split))
    columns = min(columns, count)
    rows = count // columns
    images = unit(split.images[: rows * columns])
    both = torch.stack(
        [images.unflatten(0, (rows, columns)), reconstructions(model, images).unflatten(0, (rows, columns))], 1
    )
    save_grid(path, both.flatten(0, 1).cpu(), pairs=True)


def save_curves(path: Path, metrics: list[dict[str, Any]], unit_name: str, title: str) -> None:
    """Write the validation bound, its two terms and the training loss against epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of an unwritable home

    epochs = [line["epoch"] for line in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (
        ("valid_bound", "bound (validation)", {"color": "C0", "linewidth": 2}),
        ("train_loss", "trained loss (training)", {"color": "C1"}),
        ("valid_reconstruction", "reconstruction (validation)", {"color": "C2", "linestyle": "--"}),
        ("valid_kl", "KL (validation)", {"color": "C3", "linestyle": "--"}),
    ):
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, [line[key] for line in metrics], label=label, marker=marker, **style)
    axes.set(xlabel="epoch", ylabel=unit_name, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save_run_pictures(trainer: Trainer, directory: Path, metrics: list[dict[str, Any]]) -> None:
    """Write `curves.png`, `samples.png` and `reconstructions.png` of a finished run."""
    config, model = trainer.config, trainer.model
    title = f"{config.estimator}, {config.latent}, {Path(config.dataset).name}"
    save_curves(directory / "curves.png", metrics, model.likelihood.unit, title)
    generator = Generator(trainer.device).manual_seed(config.seed)
    save_samples(directory / "samples.png", model, generator=generator)
    save_reconstructions(directory / "reconstructions.png", model, trainer.evaluation_data.test)
