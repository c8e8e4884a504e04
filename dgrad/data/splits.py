"""What a data set is: three splits of images, with or without labels. May import torch and dgrad.errors only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgrad.errors import InputError


def unit(images: Tensor) -> Tensor:
    """Pixels in [0, 1]: uint8 becomes float32 / 255, floats pass unchanged. Any shape.

    This is the one place where the two ways to store a pixel meet.

    >>> unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images


@dataclass(frozen=True, eq=False)
class Split:
    """Images `[N, C, H, W]`, uint8 (0..255 stands for 0..1) or float32 in [0, 1], and labels `[N]` int64 or None.

    Raises InputError for another dtype or shape. The pixels' range is the loader's to check.
    """

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise InputError(
                f"a split's images are {_describe(images)}; expected [N, C, H, W] of uint8 (0..255) or float32 "
                "(in [0, 1]); reshape or convert them"
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
            raise InputError(
                f"a split's labels are {_describe(labels)}; expected [{len(images)}] of int64, one for each image; "
                "reshape or convert them"
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one kind of image; `classes` names the labels 0, 1, ... where there are labels.

    Raises InputError for an empty split, and for splits whose images differ in shape or dtype.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        splits = (self.train, self.valid, self.test)
        if not all(map(len, splits)) or len({(s.images.shape[1:], s.images.dtype) for s in splits}) > 1:
            raise InputError(
                f"data set {self.name!r} has train, valid and test images "
                f"{', '.join(_describe(s.images) for s in splits)}; expected at least one image in each, all of one "
                "size and dtype; resize, convert or move images between the splits"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set on another device."""
        return replace(self, train=self.train.to(device), valid=self.valid.to(device), test=self.test.to(device))


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
