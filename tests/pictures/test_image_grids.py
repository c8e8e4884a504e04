"""Grids of images: each image where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import dgrad
from dgrad.pictures.image_grids import save_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_its_images_where_they_belong(tmp_path: Path, channels: int) -> None:
    images = torch.zeros(2, 3, channels, 8, 8)
    images[1, 2, 0] = 1  # the lower right one is white, or red
    save_grid(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == ("L" if channels == 1 else "RGB")
        size = 7 * 8 + 4
        assert grid.size == (3 * size + 4, 2 * size + 4)
        white_or_red = 255 if channels == 1 else (255, 0, 0)
        assert grid.getpixel((2 * size + 30, size + 30)) == white_or_red
        assert grid.getpixel((30, 30)) in (0, (0, 0, 0))
    with pytest.raises(dgrad.InputError, match="2 channels"):
        save_grid(tmp_path / "no.png", torch.zeros(1, 1, 2, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
