"""Estimators side by side, each with one value or several of its hyper-parameters. May import the registry; torch not by itself.

The text that names them is that of the command line: `direct,rloo`, with `direct.epsilon=0.01,0.1,1` for the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from dgrad import registry
from dgrad.errors import InputError, unknown_name


@dataclass(frozen=True)
class Variant:
    """An estimator with hyper-parameters.

    Attributes:
        estimator: its registered name.
        set: hyper-parameters as text, as in a configuration.
        swept: those of `set` that have other values in other variants of the estimator.
    """

    estimator: str
    set: Mapping[str, str] = field(default_factory=dict)
    swept: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with what tells the variant from its siblings.

        >>> Variant("direct", {"epsilon": "0.1", "samples": "2"}, ("epsilon",)).label
        'direct epsilon=0.1'
        """
        return " ".join([self.estimator, *(f"{name}={self.set[name]}" for name in self.swept)])

    @property
    def file_name(self) -> str:
        """The label as a part of a path."""
        return file_name(self.label)


def file_name(label: str) -> str:
    """A label as a part of a path.

    >>> file_name("direct epsilon=geometric:1:0.02")
    'direct-epsilon=geometric-1-0.02'
    """
    return re.sub(r"[^\w.=+-]+", "-", label)


def read_variants(estimators: str, values: Iterable[str] = ()) -> list[Variant]:
    """The variants that `--estimators` and `--set` ask for; every one has been built once, so that it is known to be possible.

    Args:
        estimators: names, separated by commas.
        values: texts `ESTIMATOR.NAME=VALUE[,VALUE ...]`; several values make a variant each.

    Returns:
        In the order of the names; the values of one estimator in ascending order where they are numbers.

    Raises:
        InputError: a text that cannot be read, an unknown name, or a value out of range.

    >>> [variant.label for variant in read_variants("rloo,direct", ["direct.epsilon=1,0.1"])]
    ['rloo', 'direct epsilon=0.1', 'direct epsilon=1']
    """
    names = list(dict.fromkeys(name.strip() for name in estimators.split(",") if name.strip()))
    if not names:
        raise InputError(f"--estimators expects names such as direct,rloo; got {estimators!r}")
    for name in names:
        registry.registry().factory("estimators", name)
    grid: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for text in values:
        estimator, key, listed = _read(text)
        if estimator not in grid:
            raise unknown_name("estimator in --set", estimator, grid, "Name it in --estimators too.")
        if key in grid[estimator]:
            raise InputError(f"--set {estimator}.{key} is given twice; list its values in one: {estimator}.{key}=1,2")
        grid[estimator][key] = sorted(dict.fromkeys(listed), key=float_or_inf)
    variants = []
    for name in names:
        swept = tuple(key for key, listed in grid[name].items() if len(listed) > 1)
        for chosen in product(*grid[name].values()):
            variant = Variant(name, dict(zip(grid[name], chosen, strict=True)), swept)
            try:
                registry.estimator(name, **variant.set)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            variants.append(variant)
    return variants


def _read(text: str) -> tuple[str, str, list[str]]:
    left, _, right = text.partition("=")
    estimator, _, key = left.strip().rpartition(".")
    values = [value.strip() for value in right.split(",")]
    if not (estimator and key and all(values)):
        raise InputError(
            f"--set expects ESTIMATOR.NAME=VALUE or several values, for example direct.epsilon=0.1,1; got {text!r}"
        )
    return estimator, key.replace("-", "_"), values


def float_or_inf(text: str) -> float:
    """The number that a text is; infinity where it is none.

    >>> float_or_inf("0.5"), float_or_inf("geometric:1:0.02")
    (0.5, inf)
    """
    try:
        return float(text)
    except ValueError:
        return math.inf
