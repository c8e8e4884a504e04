"""What a call of an estimator refuses at once: arguments of another kind, or in another order.

Each message says what was given, what was expected, and what to write instead. Shapes are checked where they matter.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical

from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import InputError

CALL = "estimator(layer, logits, objective)"


def check_arguments(layer: Any, logits: Any, generator: Any, *objective: Any) -> None:
    """Make sure that each argument of an estimator's call is of its kind. No value of a tensor is looked at.

    Raises:
        InputError: one is not.
    """
    if not isinstance(layer, LatentLayer):
        raise InputError(_wrong_layer(layer, logits))
    if not isinstance(logits, Tensor):
        raise InputError(_wrong_logits(logits))
    if objective and not callable(objective[0]):
        raise InputError(
            f"the objective is {_kind(objective[0])}; expected a function of the codes: "
            f"{CALL} with objective=lambda codes: loss(decoder(codes)), which returns [samples, batch]"
        )
    if generator is not None and not isinstance(generator, Generator):
        raise InputError(
            f"the generator is {_kind(generator)}; expected a torch.Generator: "
            "torch.Generator(logits.device).manual_seed(0)"
        )


def check_layer(layer: Any) -> None:
    """Make sure that a layer is one, outside of an estimator's call.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(layer, LatentLayer):
        spec = layer if isinstance(layer, str) else "20x10"
        raise InputError(f'the layer is {_kind(layer)}; expected a latent layer: dgrad.latent("{spec}")')


def check_spec(spec: Any, *more: Any) -> str:
    """`spec`, if it is the text of a latent.

    Raises:
        InputError: it is something else.
    """
    if isinstance(spec, str) and not more:
        return spec
    numbers = spec if isinstance(spec, (tuple, list, torch.Size)) else (spec, *more)
    if len(numbers) == 2 and all(isinstance(number, Integral) for number in numbers):
        remedy = f'write dgrad.latent("{numbers[0]}x{numbers[1]}")'
    elif isinstance(spec, LatentLayer):
        remedy = "it is a latent layer already"
    else:
        remedy = 'write dgrad.latent("20x10")'
    got = ", ".join(_kind(each) for each in (spec, *more))
    raise InputError(f"dgrad.latent got {got}; expected one text such as 20x10: {remedy}")


def check_name(name: Any) -> str:
    """`name`, if it is a text, as the name of an estimator is.

    Raises:
        InputError: it is something else.
    """
    if isinstance(name, str):
        return name
    remedy = f"{name.__name__}(...) makes one itself" if isinstance(name, type) else "dgrad estimators lists them"
    raise InputError(f'dgrad.estimator got {_kind(name)}; expected a name such as "direct": {remedy}')


def _wrong_layer(layer: Any, logits: Any) -> str:
    expected = f"expected a latent layer: {CALL}"
    if isinstance(logits, LatentLayer):
        return f"the layer is {_kind(layer)} and the logits are a latent layer; {expected}: swap the first two"
    if isinstance(layer, str):
        return f'the layer is the text {layer!r}; {expected} with layer=dgrad.latent("{layer}")'
    if isinstance(layer, Distribution):
        return f"the layer is {_kind(layer)}; {expected} with {_logits_of(layer)}"
    return f'the layer is {_kind(layer)}; {expected} with layer=dgrad.latent("20x10")'


def _wrong_logits(logits: Any) -> str:
    expected = "expected a tensor [batch, *layer.shape]"
    if isinstance(logits, Distribution):
        return f"the logits are {_kind(logits)}; {expected}: {CALL} with {_logits_of(logits)}"
    return f"the logits are {_kind(logits)}; {expected}: convert them with torch.as_tensor(logits)"


def _logits_of(distribution: Distribution) -> str:
    """What to hand over in the place of a distribution."""
    if isinstance(distribution, (Categorical, OneHotCategorical)) and len(distribution.logits.shape) >= 2:
        n, k = [1, *distribution.logits.shape[1:]][-2:]
        return f'layer=dgrad.latent("{n}x{k}") and its logits as [batch, {n}, {k}]'
    return 'layer=dgrad.latent("20x10") and the logits of its variables'


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (int, float, str, tuple, list)):
        return repr(value)[:60]
    if isinstance(value, Distribution):
        return f"a torch.distributions.{type(value).__name__}"
    return f"a {type(value).__name__}"
