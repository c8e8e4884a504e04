"""Cuts a pile of images into train, valid and test, the same way every time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dgrad.data.splits import Dataset, Split

# Not the run's seed: all runs on a data set share its splits.
SPLIT_SEED = 0


def partition(
    name: str,
    images: Tensor,
    labels: Tensor | None,
    classes: tuple[str, ...] | None,
    *,
    attributes: tuple[str, ...] | None = None,
    valid: int | None = None,
    test: int | None = None,
    seed: int = SPLIT_SEED,
) -> Dataset:
    """A data set of images `[N, C, H, W]`, cut at random into `valid`, `test` (default: N/10 each) and the rest.

    Where there are labels `[N]`, each split has the classes in proportion, as nearly as small classes allow; where
    they are `[N, n]`, a class is a combination of `attributes`. The images of a split keep their order. Raises
    InputError where a split would be empty.
    """
    count = len(images)
    valid = count // 10 if valid is None else valid
    test = count // 10 if test is None else test
    # RandomState and not default_rng: numpy promises that its stream never changes.
    order = np.random.RandomState(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(_positions(labels.cpu().numpy()[order]), kind="stable")]

    def split(indices: np.ndarray) -> Split:
        index = torch.from_numpy(np.sort(indices)).to(images.device)
        return Split(images[index], None if labels is None else labels[index])

    held_out = valid + test
    train, valid_split, test_split = map(split, (order[held_out:], order[:valid], order[valid:held_out]))
    return Dataset(name, train, valid_split, test_split, classes, attributes)


def _positions(labels: np.ndarray) -> np.ndarray:
    """Where each example stands in its class, in (0, 1): sorted by it, any stretch has the classes in proportion."""
    _, classes, counts = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
    classes = classes.reshape(-1)  # numpy 2.0 gives it more axes
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(labels))
    ranks[np.argsort(classes, kind="stable")] = np.arange(len(labels)) - np.repeat(starts, counts)
    return (ranks + 0.5) / counts[classes]
