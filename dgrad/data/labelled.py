"""Few labels: which images keep theirs, and how a training step draws them.

Nothing in a draw waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.data.batches import Batch, Batches
from dgrad.data.splits import Split, unit
from dgrad.errors import InputError

UNKNOWN = -1
"""The label of an image whose label training may not see."""

LARGEST_ROTATION = math.radians(15)
LARGEST_SHEAR = 0.2
LARGEST_ZOOM = 1.15
LARGEST_SHIFT = 0.08
"""A share of the image's side."""


def choose_labelled(labels: Int[Tensor, " images"], count: int, *, seed: int) -> Int[Tensor, " count"]:
    """Which images keep their labels: places in ascending order, chosen by the seed alone.

    Classes are balanced: the numbers of any two differ by one at most, except for a class that has no more images.

    Raises:
        InputError: there are fewer labels than that, or more classes.

    >>> choose_labelled(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 5, seed=0).tolist()
    [1, 3, 4, 5, 6]
    """
    classes = len(labels.unique())
    if not classes <= count <= len(labels):
        raise InputError(
            f"--labels {count}; expected at least one for each of the {classes} classes and at most {len(labels)}, "
            "the labels that there are"
        )
    values, order = labels.cpu().numpy(), _order(len(labels), seed)
    ranks = np.empty(len(values), dtype=np.int64)  # how many of its class come before each, in that order
    for value in np.unique(values):
        members = values[order] == value
        ranks[members] = np.arange(members.sum())
    chosen = order[np.argsort(ranks, kind="stable")[:count]]
    return torch.from_numpy(np.sort(chosen)).to(labels.device)


def choose_labelled_attributes(labels: Int[Tensor, "images n"], count: int, *, seed: int) -> Int[Tensor, " count"]:
    """Which images keep their attributes: places in ascending order, chosen by the seed alone.

    Raises:
        InputError: there are fewer images than that, or an attribute has one value in all that were chosen.
    """
    if count > len(labels):
        raise InputError(f"--labels {count}; expected at most {len(labels)}, the images that there are")
    index = torch.from_numpy(np.sort(_order(len(labels), seed)[:count])).to(labels.device)
    same = (labels[index] == labels[index[0]]).all(0)
    if same.any():
        raise InputError(
            f"--labels {count}: all of them are alike in {int(same.sum())} of {len(same)} attributes; expected both "
            "values of each: give more, or leave rare attributes out of --attributes"
        )
    return index


def _order(count: int, seed: int) -> np.ndarray:
    # RandomState and not default_rng: numpy promises that its stream never changes.
    return np.random.RandomState(np.random.SeedSequence(seed).generate_state(4)).permutation(count)


def random_affine(images: Float[Tensor, "batch c h w"], *, generator: Generator) -> Float[Tensor, "batch c h w"]:
    """Each image turned, sheared, zoomed and shifted a little, by its own draws; the border's pixels go on outside."""
    height, width = images.shape[-2:]
    draws = torch.rand(len(images), 6, generator=generator, device=images.device) * 2 - 1  # [B, 6] in [-1, 1]
    angle, shear = LARGEST_ROTATION * draws[:, 0], LARGEST_SHEAR * draws[:, 1]
    zoom_x, zoom_y = (LARGEST_ZOOM ** draws[:, i] for i in (2, 3))
    shift_x, shift_y = (2 * LARGEST_SHIFT * draws[:, i] for i in (4, 5))  # the side is 2 long
    cos, sin, wide = angle.cos(), angle.sin(), height / width
    matrices = torch.stack(
        [
            torch.stack([zoom_x * cos, wide * zoom_y * (shear * cos - sin), shift_x], -1),
            torch.stack([zoom_x * sin / wide, zoom_y * (shear * sin + cos), shift_y], -1),
        ],
        -2,
    )  # [B, 2, 3]
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class LabelledImages:
    """Labelled images, from which a training step draws with replacement, on the split's device.

    Args:
        images: of the labelled ones alone; grey where they are binarised after the draw.
        index: their places in the training split.
        binarize: what becomes of a drawn image's pixels: `threshold` (rounded at 0.5), `draw` (a Bernoulli variable
            each) or `none`.
        augment: whether a drawn image is first redrawn by a small random affine map.
        generator: of the draws, on that device.
    """

    def __init__(
        self,
        images: Split,
        index: Int[Tensor, " images"],
        *,
        generator: Generator,
        binarize: str = "none",
        augment: bool = False,
    ) -> None:
        if images.labels is None:
            raise InputError("labelled images without labels; expected a split with labels")
        self.images = images.images
        self.labels = images.labels
        self.index = index
        self.generator = generator
        self.binarize = binarize
        self.augment = augment

    def draw(self, count: int) -> Batch:
        """A batch of `count` images."""
        device = self.images.device
        chosen = torch.randint(len(self.images), (count,), generator=self.generator, device=device)
        images = unit(self.images.index_select(0, chosen))
        if self.augment:
            images = random_affine(images, generator=self.generator)
        if self.binarize == "threshold":
            images = (images >= 0.5).float()
        elif self.binarize == "draw":
            images = (torch.rand(images.shape, generator=self.generator, device=device) < images).float()
        return Batch(images, self.labels.index_select(0, chosen), self.index.index_select(0, chosen))


class SemiSupervisedBatches:
    """An endless iterator: a batch of `batches` with its labels hidden (-1), and behind it `count` labelled images."""

    def __init__(self, batches: Batches, labelled: LabelledImages, count: int) -> None:
        self.batches = batches
        self.labelled = labelled
        self.count = count
        # Of the unlabelled images: they decide where the stream stands.
        self.steps_per_epoch, self.batch_size, self.order = batches.steps_per_epoch, batches.batch_size, batches.order
        self.advance = batches.advance

    def __iter__(self) -> SemiSupervisedBatches:
        return self

    def __next__(self) -> Batch:
        return self.gather(self.advance())

    @property
    def generators(self) -> list[Generator]:
        """What it draws from."""
        return [*self.batches.generators, self.labelled.generator]

    def gather(self, index: Int[Tensor, " unlabelled"]) -> Batch:
        """The batch of these unlabelled images, with labelled ones that are drawn now."""
        hidden = self.batches.gather(index)
        assert hidden.labels is not None
        unknown = torch.full_like(hidden.labels, UNKNOWN)
        if self.count == 0:
            return Batch(hidden.images, unknown, hidden.index)
        shown = self.labelled.draw(self.count)
        assert shown.labels is not None
        return Batch(
            torch.cat([hidden.images, shown.images]),
            torch.cat([unknown, shown.labels]),
            torch.cat([hidden.index, shown.index]),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands, as tensors on the CPU."""
        return {**self.batches.state_dict(), "labelled": self.labelled.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on bit for bit where `state_dict()` was called.

        Raises:
            InputError: the state is that of other batches.
        """
        self.batches.load_state_dict(state)
        self.labelled.generator.set_state(state["labelled"].cpu())
