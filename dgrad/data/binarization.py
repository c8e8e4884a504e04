"""Pixels made 0 or 1.

Of the four conventions, two change the data once, here; `dynamic` draws anew in every batch and is `Batches`' to do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dgrad.data.splits import Dataset, Split, unit
from dgrad.errors import unknown_name

BINARIZATIONS = ("threshold", "static", "dynamic", "none")

# Images per draw: bounds the memory that the random numbers take. Changing it changes every static binarisation.
_CHUNK = 4096


def binarize(dataset: Dataset, mode: str, *, seed: int) -> Dataset:
    """The data set with pixels of 0 and 255 (uint8), by one of `BINARIZATIONS`.

    - `threshold`: 1 where a pixel is at least 0.5 (uint8: at least 128).
    - `static`: one Bernoulli draw for each pixel, of that probability. It depends on `seed` (0 or more) and on the
      split, not on the device.
    - `dynamic`, `none`: the data unchanged. For `dynamic`, train with `Batches(..., dynamic=True)`.

    Raises InputError for another mode.
    """
    if mode not in BINARIZATIONS:
        raise unknown_name("binarisation", mode, BINARIZATIONS)
    if mode in ("dynamic", "none"):
        return dataset

    def binary(split: Split, part: int) -> Split:
        images = _threshold(split.images) if mode == "threshold" else _static(split.images, seed=(seed, part))
        return Split(images, split.labels)

    train, valid, test = map(binary, (dataset.train, dataset.valid, dataset.test), range(3))
    return replace(dataset, train=train, valid=valid, test=test)


def _threshold(images: Tensor) -> Tensor:
    return (images >= (128 if images.dtype == torch.uint8 else 0.5)).to(torch.uint8) * 255


def _static(images: Tensor, *, seed: tuple[int, int]) -> Tensor:
    # Drawn on the CPU, so that the result is the same whichever device holds the images.
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    chunks = (images[start : start + _CHUNK].cpu() for start in range(0, len(images), _CHUNK))
    drawn = [torch.rand(chunk.shape, generator=generator) < unit(chunk) for chunk in chunks]
    return (torch.cat(drawn).to(torch.uint8) * 255).to(images.device)
