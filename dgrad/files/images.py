"""Reads one image file. Free of torch: commands without torch use it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError


def read_image(file: Path) -> npt.NDArray[np.uint8]:
    """The pixels of an image file, `[H, W]` where it is grey, else `[H, W, 3]`.

    16-bit greys keep their upper 8 bits, palettes are looked up, transparency is laid over black.

    Raises:
        InputError: it cannot be read as an image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return _eight_bits(image)
    except Exception as error:  # what a decoder raises on a broken file is anybody's guess
        raise InputError(
            f"{file} cannot be read as an image ({type(error).__name__}: {error}); expected a whole 8- or 16-bit "
            "image; replace or delete it"
        ) from error


def _eight_bits(image: Any) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, whether PIL holds them in 16 or in 32
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, more than 16 bits hold")
        return (values >> 8).astype(np.uint8)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.array(image.convert("L" if grey else "RGB"))
