"""Hyper-parameters of a factory: which there are, and reading them from text. May import no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dgrad.core.schedules import Schedule, schedule
from dgrad.errors import InputError, unknown_name


def hyperparameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords of a factory, which are its hyper-parameters."""
    return dict(inspect.signature(factory, eval_str=True).parameters)


def read_hyperparameters(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyper-parameters with text turned into what each one's annotation says.

    Args:
        name: the estimator's name, for messages.
        given: values, or their text as the command line has it.

    Raises:
        InputError: an unknown name, or a text that cannot be read.

    >>> def factory(epsilon: float | Schedule = 0.1, samples: int = 1): ...
    >>> read_hyperparameters("mine", factory, {"epsilon": "0.5", "samples": "2"})
    {'epsilon': Constant(value=0.5), 'samples': 2}
    """
    known = hyperparameters_of(factory)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    result = {}
    for key, value in given.items():
        if key not in known:
            if not takes_any:
                raise unknown_name(f"hyper-parameter of {name}", key, known)
            result[key] = value
        else:
            result[key] = _read(key, value, known[key].annotation) if isinstance(value, str) else value
    return result


def _read(key: str, text: str, annotation: Any) -> Any:
    try:
        if annotation in (float | Schedule, Schedule):
            return schedule(text)
        if annotation is bool:
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
        if annotation in (int, float):
            return annotation(text)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[annotation]
        raise InputError(f"{key}: expected {expected}; got {text!r}") from None
    return text


def defaults_of(factory: Callable[..., Any]) -> dict[str, str]:
    """Each hyper-parameter of a factory with its default, as text."""
    return {
        name: "" if parameter.default is parameter.empty else str(parameter.default)
        for name, parameter in hyperparameters_of(factory).items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
