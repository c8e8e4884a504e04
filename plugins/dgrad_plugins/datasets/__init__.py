"""The built-in data sets, by name. May import torch and dgrad's public modules; scikit-learn only where it is used.

Each factory takes the folder where data sets keep their files; the first line of its docstring is its description.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dgrad.data import Dataset, download_idx, load_idx, partition
from dgrad_plugins.datasets._celeba import load_celeba

_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def digits(data_root: Path) -> Dataset:
    """Handwritten digits, 8x8, grey: 1,297 train, 250 valid, 250 test; bundled, needs no download"""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # pixels are 0 to 16
    return partition("digits", images, torch.from_numpy(bunch.target).long(), _DIGITS, valid=250, test=250)


def mnist(data_root: Path) -> Dataset:
    """Handwritten digits, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("mnist", download_idx("MNIST", data_root), _DIGITS)


def fashion_mnist(data_root: Path) -> Dataset:
    """Pieces of clothing in 10 classes, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("fashion-mnist", download_idx("FashionMNIST", data_root), _CLOTHES)


def kmnist(data_root: Path) -> Dataset:
    """Handwritten Japanese characters in 10 classes, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("kmnist", download_idx("KMNIST", data_root), _KANA)


def celeba(data_root: Path) -> Dataset:
    """Faces with 40 attributes, 64x64, colour: 162,770 train, 19,867 valid, 19,962 test; you put its files into DATA-ROOT/celeba"""
    return load_celeba(data_root)


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "kmnist": kmnist,
    "celeba": celeba,
}
