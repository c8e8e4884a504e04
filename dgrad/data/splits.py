"""What a data set is: three splits of images, with or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgrad.errors import InputError, unknown_name


def unit(images: Tensor) -> Tensor:
    """Pixels in [0, 1]: uint8 becomes float32 / 255, floats pass unchanged. Any shape.

    This is the one place where the two ways to store a pixel meet.

    >>> unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True, eq=False)
class Split:
    """Images `[N, C, H, W]`, uint8 (0..255 stands for 0..1) or float32 in [0, 1], and labels or None.

    Labels are int64: `[N]`, a class for each image, or `[N, n]`, the values of n attributes.

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
        if labels is None:
            return
        if labels.ndim not in (1, 2) or len(labels) != len(images) or labels.dtype != torch.int64:
            raise InputError(
                f"a split's labels are {_describe(labels)}; expected [{len(images)}] of int64, one for each image, or "
                f"[{len(images)}, n] for n attributes; reshape or convert them"
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one kind of image; `classes` names the labels 0, 1, ... where there are labels.

    Where the labels are the values, 0 or 1, of several attributes, `attributes` names these instead.

    Raises InputError for an empty split, for splits whose images differ in shape or dtype, and for more or fewer
    names than attributes.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        splits = (self.train, self.valid, self.test)
        if not all(map(len, splits)) or len({(s.images.shape[1:], s.images.dtype) for s in splits}) > 1:
            raise InputError(
                f"data set {self.name!r} has train, valid and test images "
                f"{', '.join(_describe(s.images) for s in splits)}; expected at least one image in each, all of one "
                "size and dtype; resize, convert or move images between the splits"
            )
        names = self.attributes or ()
        shapes = [() if split.labels is None else split.labels.shape[1:] for split in splits]
        if any(shape != ((len(names),) if names else ()) for shape in shapes) or len(set(names)) < len(names):
            raise InputError(
                f"data set {self.name!r} has labels of shape "
                f"{', '.join(str([len(s), *shape]) for s, shape in zip(splits, shapes, strict=True))} "
                f"and {len(names)} names of attributes ({', '.join(names)}); expected a name of its own for each "
                "column of labels [N, n]"
            )

    def with_attributes(self, names: Sequence[str]) -> Dataset:
        """The same images, labelled with these attributes only, in this order.

        Raises InputError where there are no attributes, for one that there is not, and for one that is named twice.
        """
        if self.attributes is None:
            raise InputError(
                f"--attributes {','.join(names)}: {self.name} has no attributes; leave --attributes out, or take "
                "data that has some"
            )
        if unknown := [name for name in names if name not in self.attributes]:
            raise unknown_name("attribute", unknown[0], self.attributes)
        columns = [self.attributes.index(name) for name in names]

        def chosen(split: Split) -> Split:
            assert split.labels is not None
            return Split(split.images, split.labels[:, columns])

        train, valid, test = map(chosen, (self.train, self.valid, self.test))
        return replace(self, train=train, valid=valid, test=test, attributes=tuple(names))

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
