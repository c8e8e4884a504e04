"""Hyper-parameters of a factory: which there are, how they are named for estimators, and reading them from text.

A name is of all estimators, `epsilon`, or of one, `direct.epsilon`. Hyphens in it are underscores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dgrad.core.schedules import Schedule, schedule
from dgrad.errors import InputError, unknown_name

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class RunDefaults:
    """What a training run gets for settings that nobody gave, said by its model or its estimator.

    Attributes:
        lr: the learning rate, a schedule. The model's goes before the estimator's.
        set: hyper-parameters of the estimator. They and its `lr` are for runs without labels and with the KL inside
            the objective.
        kl_weight: the weight of the code's KL, a schedule, for runs without labels.
        gaussian: how many Gaussian variables the model has in a run without labels.
        evaluations: how many of the model's decoder an image costs in a step, at most. Where a sweep costs more, an
            estimator with `sweep_share` sweeps a share of the rows.
        why: the reason, in a few words.
    """

    lr: str | None = None
    set: Mapping[str, str] = field(default_factory=dict)
    kl_weight: str | None = None
    gaussian: int | None = None
    evaluations: int | None = None
    why: str = ""


def run_defaults(**values: Any) -> Callable[[Factory], Factory]:
    """Say what training runs get for settings that nobody gave: a decorator of a model's or an estimator's factory.

    Args:
        values: the attributes of `RunDefaults`.

    >>> @run_defaults(lr="cosine:0.002:0", why="convolutions")
    ... def factory(layer, image_shape, likelihood, hidden): ...
    >>> run_defaults_of(factory).lr
    'cosine:0.002:0'
    """
    defaults = RunDefaults(**values)

    def decorate(factory: Factory) -> Factory:
        factory.run_defaults = defaults  # type: ignore[attr-defined]
        return factory

    return decorate


def run_defaults_of(factory: Callable[..., Any]) -> RunDefaults:
    """What `run_defaults` said of a factory itself; an estimator does not inherit it."""
    defaults: RunDefaults = vars(factory).get("run_defaults", RunDefaults())
    return defaults


def hyperparameters_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords of a factory, which are its hyper-parameters."""
    return dict(inspect.signature(factory, eval_str=True).parameters)


def read_hyperparameters(name: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyper-parameters with text turned into what each one's annotation says.

    Args:
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


def flat_set(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of hyper-parameters by `NAME` or `ESTIMATOR.NAME`. TOML makes a table of `direct.epsilon = 1`.

    >>> flat_set({"direct": {"sweep-share": 0.1}, "st-gumbel-softmax.temperature": 1, "samples": 2})
    {'direct.sweep_share': 0.1, 'st-gumbel-softmax.temperature': 1, 'samples': 2}
    """
    flat = {}
    for name, value in dict(table).items():
        entries = (
            {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        for key, entry in entries.items():
            owner, dot, last = str(key).rpartition(".")
            flat[f"{owner}{dot}{last.replace('-', '_')}"] = entry
    return flat


def read_set(texts: Iterable[str]) -> dict[str, list[str]]:
    """The values that `--set` lists, by `NAME` or `ESTIMATOR.NAME`.

    Raises:
        InputError: a text is of another form, or a name is given twice.

    >>> read_set(["direct.sweep-share=0.1,1", "samples=4"])
    {'direct.sweep_share': ['0.1', '1'], 'samples': ['4']}
    """
    given: dict[str, list[str]] = {}
    for text in texts:
        left, _, right = text.partition("=")
        values = [value.strip() for value in right.split(",")]
        (name,) = flat_set({left.strip(): values})
        if not (all(name.split(".")) and all(values)):
            raise InputError(
                f"--set expects NAME=VALUE or ESTIMATOR.NAME=VALUE, for example direct.epsilon=0.1; got {text!r}"
            )
        if name in given:
            raise InputError(f"--set {name} is given twice; list its values in one: {name}=1,2")
        given[name] = values
    return given


def check_owners(given: Iterable[str], estimators: Iterable[str]) -> None:
    """Make sure that hyper-parameters `ESTIMATOR.NAME` are of estimators that take part.

    Raises:
        InputError: one is of another.
    """
    known = [*estimators]
    for name in given:
        owner = name.rpartition(".")[0]
        if owner and owner not in known:
            raise unknown_name("estimator in --set", owner, known, "Name it among the estimators too.")


def set_of(estimator: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of one estimator: its own go before those of all.

    >>> set_of("direct", {"direct.epsilon": 2, "epsilon": 0.5, "rloo.samples": 4})
    {'epsilon': 2}
    """
    common = {name: value for name, value in given.items() if "." not in name}
    return common | {
        name.rpartition(".")[2]: value for name, value in given.items() if name.rpartition(".")[0] == estimator
    }


def with_remedy(error: InputError, label: str, factory: Callable[..., Any], given: Iterable[str]) -> InputError:
    """The error of a variant `label`. It names the hyper-parameter of all that its estimator does not know.

    Args:
        given: the names of hyper-parameters, by `NAME` or `ESTIMATOR.NAME`.
    """
    known = hyperparameters_of(factory)
    foreign = [name for name in given if "." not in name and name not in known]
    remedy = f"; write ESTIMATOR.{foreign[0]} to give it to one estimator alone" if foreign else ""
    return InputError(f"{label}: {error}{remedy}")


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
