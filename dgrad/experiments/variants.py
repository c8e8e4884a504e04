"""Estimators side by side, each with one value or several of its hyper-parameters.

Their text is that of the command line: `direct,rloo`, with `direct.epsilon=0.01,0.1,1` for the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from dgrad import registry
from dgrad.errors import InputError
from dgrad.hyperparameters import check_owners, read_set, set_of, with_remedy


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
    """The variants that `--estimators` and `--set` ask for. Each has been built once, so that it is possible.

    Args:
        estimators: names, separated by commas.
        values: texts as `dgrad.hyperparameters.read_set` reads them. Several values make a variant each.

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
    factories = {name: registry.registry().factory("estimators", name) for name in names}
    given = read_set(values)
    check_owners(given, names)
    variants = []
    for name in names:
        own = {key: sorted(dict.fromkeys(listed), key=float_or_inf) for key, listed in set_of(name, given).items()}
        swept = tuple(key for key, listed in own.items() if len(listed) > 1)
        for chosen in product(*own.values()):
            variant = Variant(name, dict(zip(own, chosen, strict=True)), swept)
            try:
                registry.estimator(name, **variant.set)
            except InputError as error:
                raise with_remedy(error, name, factories[name], given) from None
            variants.append(variant)
    return variants


def float_or_inf(text: str) -> float:
    """The number that a text is; infinity where it is none.

    >>> float_or_inf("0.5"), float_or_inf("geometric:1:0.02")
    (0.5, inf)
    """
    try:
        return float(text)
    except ValueError:
        return math.inf
