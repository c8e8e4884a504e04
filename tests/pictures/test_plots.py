"""The picture of what a code is used for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dgrad.pictures.plots import save_usage
from dgrad.vae.usage import Variables


@pytest.mark.parametrize("known", [True, False])
def test_the_picture_shows_variables_where_there_are_some(tmp_path: Path, known: bool) -> None:
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    variables = Variables([2, 3], [2, 2], [2.0, 1.65], [0.1, 0.4], rows)
    save_usage(tmp_path / "code.png", variables if known else None, "a run")
    with Image.open(tmp_path / "code.png") as picture:
        assert picture.size == (1080, 480)
        blue = sum(count for count, (r, g, b, _) in picture.convert("RGBA").getcolors(2**20) if b > r + 60)  # type: ignore[misc,union-attr]
    assert (blue > 1000) == known
