"""Reads a folder of images sorted by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dgrad.data.partitioning import partition
from dgrad.data.splits import Dataset
from dgrad.errors import InputError
from dgrad.files.images import read_image

_FEWEST = 10
_LAYOUT = "<folder>/<class>/<image>, with .png, .jpg and the like"
_SPLIT_NAMES = {"train", "valid", "val", "test"}


def load_folder(path: Path) -> Dataset:
    """The data set in a folder `<path>/<class>/<image>`, uint8 `[N, C, H, W]`.

    80 % of each class are for training, 10 % for validation, 10 % for testing, always the same. C is 1 if every image
    is grey, 3 otherwise. 16-bit greys keep their upper 8 bits, palettes are looked up, transparency is laid over black.
    All images must have one size, and be stored as grey or as colour alike.

    Raises InputError for a folder without class folders or images, an unreadable image, and images that differ.
    """
    files, labels, classes = _list(path)
    images: list[np.ndarray] = []  # each [H, W] or [H, W, 3]
    for file in files:
        image = read_image(file)
        if images and image.shape != images[0].shape:
            raise InputError(
                f"{files[0]} is {_describe(images[0])}, {file} is {_describe(image)}; expected one size, all grey or "
                "all colour; resize or convert them"
            )
        images.append(image)
    stacked = np.stack(images)
    if stacked.ndim == 3:
        stacked = stacked[..., None]
    elif (stacked == stacked[..., :1]).all():
        stacked = stacked[..., :1]
    pixels = torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
    return partition(path.name or str(path), pixels, torch.tensor(labels), classes)


def _list(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise InputError(f"there is no folder {path}; expected {_LAYOUT}; check the path")
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if not folders:
        raise InputError(
            f"{path} has no class folders; expected {_LAYOUT}; sort the images into one folder for each class"
        )
    if folders <= _SPLIT_NAMES:
        raise InputError(
            f"{path} has the folders {', '.join(sorted(folders))}, which are splits and not classes; expected "
            f"{_LAYOUT}; give one of them (it is split again)"
        )
    found = ImageFolder(str(path), allow_empty=True)
    if empty := sorted(set(range(len(found.classes))) - set(found.targets)):
        raise InputError(
            f"{path / found.classes[empty[0]]} has no images; expected {_LAYOUT}; add some or remove the folder"
        )
    if len(found.samples) < _FEWEST:
        raise InputError(
            f"{path} has {len(found.samples)} images; expected at least {_FEWEST}, to be split; add images"
        )
    return [Path(file) for file, _ in found.samples], list(found.targets), tuple(found.classes)


def _describe(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    return f"{width}x{height} {'grey' if image.ndim == 2 else 'colour'}"
