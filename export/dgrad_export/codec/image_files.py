"""Decoded images as PNG files: one for each, or all in one grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dgrad.errors import InputError
from dgrad.files.atomic import atomic_directory, atomic_file, check_place

CELL = 56
"""Pixels of the longer side of an image in a grid. Smaller images are enlarged smoothly, by a whole factor."""
GAP = 4
"""White pixels around each image of a grid."""
LARGEST_GRID = 100_000_000
"""Pixels that a grid may have."""

Pixels = npt.NDArray[np.float32]
Add = Callable[[Pixels], None]
"""Takes images `[B, C, H, W]` in [0, 1], batch after batch."""


def check_out(out: Path) -> None:
    """Check, before any work, that pictures can be written there.

    Raises:
        InputError: they cannot.
    """
    if out.suffix.lower() == ".png":
        check_place("--out", out, "picture")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "is not empty" if out.is_dir() else "is a file"
        raise InputError(
            f"--out {out} {found}; expected a new directory for one PNG each, or a name that ends with .png for a grid"
        )


@contextmanager
def writing(out: Path, columns: int) -> Iterator[Add]:
    """A context whose value takes the images. Their files appear, whole, when it ends well.

    Args:
        out: a name that ends with .png for a grid, or else a directory for 000000.png, 000001.png, ...
    """
    if out.suffix.lower() == ".png":
        grid = _Grid(columns)
        yield grid.add
        with atomic_file(out) as temporary:
            grid.picture().save(temporary, format="PNG")
        return
    numbers = count()

    def add(images: Pixels) -> None:
        for image in images:
            _picture(image).save(folder / f"{next(numbers):06d}.png", format="PNG")

    with atomic_directory(out.resolve()) as folder:
        yield add


class _Grid:
    """All images, row by row, on one picture in memory."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.cells: list[Image.Image] = []

    def add(self, images: Pixels) -> None:
        for image in images:
            cell = _picture(image)
            factor = max(1, -(-CELL // max(cell.size)))
            self.cells.append(cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.BICUBIC))
            if len(self.cells) * (cell.width * factor + GAP) * (cell.height * factor + GAP) > LARGEST_GRID:
                raise InputError(
                    f"a grid of more than {len(self.cells) - 1} such images is larger than {LARGEST_GRID:,} pixels; "
                    "give --out a directory for one PNG each"
                )

    def picture(self) -> Image.Image:
        """The grid so far.

        Raises:
            InputError: there is no image.
        """
        if not self.cells:
            raise InputError("there are no codes; expected at least one for a grid")
        first = self.cells[0]
        width, height = first.width + GAP, first.height + GAP
        columns = min(self.columns, len(self.cells))
        rows = -(-len(self.cells) // columns)
        white = 255 if first.mode == "L" else (255, 255, 255)
        grid = Image.new(first.mode, (columns * width + GAP, rows * height + GAP), white)
        for index, cell in enumerate(self.cells):
            row, column = divmod(index, columns)
            grid.paste(cell, (GAP + column * width, GAP + row * height))
        return grid


def _picture(image: Pixels) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    if len(pixels) not in (1, 3):
        raise InputError(f"cannot draw images of {len(pixels)} channels; expected 1 (grey) or 3 (colour)")
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
