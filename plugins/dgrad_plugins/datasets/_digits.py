"""Handwritten digits that scikit-learn brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy
import torch

from dgrad.data import Dataset, partition


def digits(data_root: Path) -> Dataset:
    """Handwritten digits, 8x8, grey: 1,297 train, 250 valid, 250 test; bundled, needs no download"""
    # sklearn.datasets.load_digits reads the same file, but its import takes a second: it brings scipy.stats along.
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "scikit-learn is a dependency"
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = numpy.loadtxt(file, delimiter=",", dtype=numpy.int64)  # 64 pixels, then the label
    images = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8) / 16  # pixels are 0 to 16
    return partition("digits", images, torch.from_numpy(table[:, -1]), tuple("0123456789"), valid=250, test=250)
