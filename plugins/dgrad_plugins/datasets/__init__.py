"""The built-in data sets, by name.

Each factory takes the folder where data sets keep their files; the first line of its docstring is its description.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dgrad.data import Dataset
from dgrad_plugins.datasets._celeba import celeba
from dgrad_plugins.datasets._digits import digits
from dgrad_plugins.datasets._mnist import fashion_mnist, kmnist, mnist

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "kmnist": kmnist,
    "celeba": celeba,
}
