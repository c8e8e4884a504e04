"""Handwritten digits that scikit-learn brings."""

from __future__ import annotations

from pathlib import Path

import torch

from dgrad.data import Dataset, partition


def digits(data_root: Path) -> Dataset:
    """Handwritten digits, 8x8, grey: 1,297 train, 250 valid, 250 test; bundled, needs no download"""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # pixels are 0 to 16
    return partition("digits", images, torch.from_numpy(bunch.target).long(), tuple("0123456789"), valid=250, test=250)
