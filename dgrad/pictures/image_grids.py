"""Grids of images: samples, reconstructions, classes and attributes. PIL is imported inside functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dgrad.core.restricted import Restricted
from dgrad.data import Split, unit
from dgrad.errors import InputError
from dgrad.files.atomic import atomic_file
from dgrad.vae.evaluation import evaluating
from dgrad.vae.model import DiscreteVAE

HEADING = 16
"""Pixels above a grid for a line of text."""
CELL = 56
"""Smaller images are enlarged by a whole factor until their longer side has at least this many pixels, smoothly."""


def save_grid(path: Path, images: Tensor, *, pairs: bool = False, headings: Sequence[str] = ()) -> None:
    """Write images `[rows, columns, C, H, W]` in [0, 1] as one PNG.

    Args:
        pairs: keep rows two and two together, with a wider gap after each pair.
        headings: texts above equally many columns each, which a wider gap keeps apart.

    Raises:
        InputError: the images have neither one channel nor three.
    """
    from PIL import Image, ImageDraw

    rows, columns, channels, height, width = images.shape
    if channels not in (1, 3):
        raise InputError(f"cannot draw images of {channels} channels; expected 1 (grey) or 3 (colour)")
    factor = max(1, -(-CELL // max(height, width)))
    cells = (
        F.interpolate(images.flatten(0, 1), scale_factor=factor, mode="bicubic") if factor > 1 else images.flatten(0, 1)
    )
    cells = (cells.clamp(0, 1) * 255).round().to(torch.uint8).unflatten(0, (rows, columns))
    gap, wide_gap = 4, 16
    header = HEADING if headings else 0
    tops = _starts(rows, height * factor, gap, 2 if pairs else rows, wide_gap)
    per_heading = columns // max(1, len(headings))
    lefts = _starts(columns, width * factor, gap, per_heading, wide_gap)
    canvas = torch.full((header + tops[-1] + height * factor + gap, lefts[-1] + width * factor + gap, channels), 255)
    for row, top in enumerate(header + start for start in tops):
        for column, left in enumerate(lefts):
            canvas[top : top + height * factor, left : left + width * factor] = cells[row, column].permute(1, 2, 0)
    pixels = canvas.to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    for place, heading in enumerate(headings):
        ImageDraw.Draw(picture).text((lefts[place * per_heading], gap), heading, fill=0)
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _starts(count: int, size: int, gap: int, group: int, wide_gap: int) -> list[int]:
    """Where `count` cells begin, with a gap before each and a wide one before each group but the first."""
    return [gap + cell * (size + gap) + cell // group * (wide_gap - gap) for cell in range(count)]


@torch.no_grad()
def prior_samples(model: DiscreteVAE, count: int, *, generator: Generator) -> Tensor:
    """`[count, C, H, W]` expected images of codes, and Gaussian variables, drawn from their prior."""
    logits = torch.zeros(1, *model.layer.shape, device=generator.device)
    codes = model.layer.sample(logits, count, generator=generator).squeeze(1)
    return model.decode(codes, model.prior_gaussian(count, generator=generator))


@torch.no_grad()
def class_grid(model: DiscreteVAE, rows: int, *, generator: Generator, variables: int = 1) -> Tensor:
    """`[rows, variables * k, C, H, W]` expected images: the values of the code's first variables against styles.

    A column has one value of one variable, a row one style. A style is all the rest, drawn from its prior: the other
    variables and the Gaussian ones. Where there is no rest, there is one row.

    Raises:
        InputError: the code is no stack of independent variables.
    """
    layer = model.layer
    if not layer.one_hot_rows or isinstance(layer, Restricted):
        raise InputError(
            "--grid needs a code of independent categorical variables of one size, such as 1x10; "
            f"got {layer}: leave --grid out"
        )
    n, k = layer.shape
    rows = rows if n > 1 or model.gaussian else 1
    uniform = torch.zeros(1, n, k, device=generator.device)
    codes = layer.sample(uniform, rows, generator=generator).squeeze(1)  # [rows, n, k]
    return _grid_of_styles(model, codes, model.prior_gaussian(rows, generator=generator), variables)


@torch.no_grad()
def toggle_attributes(model: DiscreteVAE, images: Tensor) -> Tensor:
    """`[N, n * k, C, H, W]` expected images: each image reconstructed, with each variable of its code at each value."""
    with evaluating(model):
        posterior = model.posterior(images)
    return _grid_of_styles(model, model.layer.argmax(posterior.logits), posterior.mean, model.layer.shape[0])


def _grid_of_styles(model: DiscreteVAE, codes: Tensor, gaussian: Tensor | None, variables: int) -> Tensor:
    """A row for each of `codes` `[rows, n, k]` and its Gaussian variables; a column for each value of the variables."""
    k = codes.shape[-1]
    columns = variables * k
    codes = codes.unsqueeze(1).repeat(1, columns, 1, 1)  # [rows, columns, n, k]
    for variable in range(variables):
        codes[:, variable * k : (variable + 1) * k, variable] = torch.eye(k, device=codes.device)
    return model.decode(codes, None if gaussian is None else gaussian.unsqueeze(1).expand(-1, columns, -1))


@torch.no_grad()
def reconstructions(model: DiscreteVAE, images: Tensor) -> Tensor:
    """`[N, C, H, W]` expected images of each image's most probable code and the mean of its Gaussian variables."""
    with evaluating(model):
        posterior = model.posterior(images)
    return model.decode(model.layer.argmax(posterior.logits), posterior.mean)


def save_samples(path: Path, model: DiscreteVAE, *, generator: Generator, rows: int = 8, columns: int = 12) -> None:
    """Write a grid of prior samples."""
    save_grid(path, prior_samples(model, rows * columns, generator=generator).unflatten(0, (rows, columns)).cpu())


def save_class_grid(path: Path, model: DiscreteVAE, *, generator: Generator, rows: int = 8) -> None:
    """Write a column for each value of the code's first variable and a row for each style (figure 7 of the paper)."""
    save_grid(path, class_grid(model, rows, generator=generator).cpu())


def save_class_grids(path: Path, models: Mapping[str, DiscreteVAE], *, seed: int = 0, rows: int = 8) -> None:
    """Write such a grid for each of several models of one size, side by side under their names (paper, figure 5)."""
    grids = [class_grid(model, rows, generator=Generator().manual_seed(seed)) for model in models.values()]
    save_grid(path, torch.cat(grids, 1).cpu(), headings=list(models))


def save_attribute_grid(
    path: Path, model: DiscreteVAE, attributes: Sequence[str], *, generator: Generator, rows: int = 8
) -> None:
    """Write each attribute off and on, under its name, and a row for each style, drawn from the prior."""
    images = class_grid(model, rows, generator=generator, variables=len(attributes))
    save_grid(path, images.cpu(), headings=attributes)


def save_toggled(path: Path, model: DiscreteVAE, split: Split, attributes: Sequence[str], *, rows: int = 8) -> None:
    """Write each attribute off and on, under its name, a row for each of the split's first images (paper, figure 4)."""
    save_grid(path, toggle_attributes(model, unit(split.images[:rows])).cpu(), headings=attributes)


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
