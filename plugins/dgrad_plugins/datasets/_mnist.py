"""MNIST and two data sets in its format."""

from __future__ import annotations

from pathlib import Path

from dgrad.data import Dataset, download_idx, load_idx

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def mnist(data_root: Path) -> Dataset:
    """Handwritten digits, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("mnist", download_idx("MNIST", data_root), tuple("0123456789"))


def fashion_mnist(data_root: Path) -> Dataset:
    """Pieces of clothing in 10 classes, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("fashion-mnist", download_idx("FashionMNIST", data_root), CLOTHES)


def kmnist(data_root: Path) -> Dataset:
    """Handwritten Japanese characters in 10 classes, 28x28, grey: 50,000 train, 10,000 valid, 10,000 test"""
    return load_idx("kmnist", download_idx("KMNIST", data_root), KANA)
