"""The options that stand for settings, made from the fields of `TrainConfig` and read; and options of many commands."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dgrad.config import (
    LISTS,
    RunSettings,
    TrainConfig,
    about,
    configure,
    kind_of,
    option,
    panel_of,
    read_toml,
    with_names,
)
from dgrad.errors import InputError
from dgrad.hyperparameters import check_owners, read_set, set_of

FIELDS = {item.name: item for item in fields(TrainConfig)}
DEFAULTS = TrainConfig()
PLURALS = ("estimator", "latent")
"""Settings whose option has the plural as a second name."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to the standard error.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help=about(FIELDS["plugins"]).help, metavar="PLUGIN")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the runs, and what is left to do.")]
Jobs = Annotated[int | None, typer.Option(help="Runs at a time. (default: as many as devices)", metavar="N", min=1)]
Devices = Annotated[
    str | None,
    typer.Option(
        help="The devices that runs are given in turn. (default: every GPU, else the CPU)", metavar="NAME,..."
    ),
]
Estimators = Annotated[
    str, typer.Option("--estimators", "--estimator", help="Names; `dgrad estimators` lists them.", metavar="NAME,...")
]
Seeds = Annotated[
    int | None,
    typer.Option(
        help="Runs of each combination, with seeds 0, 1 ... (default: the recipe's, else 1)", metavar="N", min=1
    ),
]


class Command(TyperCommand):
    """A command whose help shows no kind of value beside flags."""

    own_panel: str | None = None
    """The panel of options that name none."""

    def get_params(self, ctx: Any) -> Any:
        """The options, as the help shows them."""
        found = super().get_params(ctx)
        for parameter in found:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
            if self.own_panel is not None and getattr(parameter, "rich_help_panel", "") is None:
                parameter.rich_help_panel = self.own_panel  # type: ignore[attr-defined]
        return found


class RunCommand(Command):
    """A command whose own options stand beside the settings of a run."""

    own_panel = RunSettings.panel


# Making


def takes_settings(
    *names: str, but: Container[str] = (), several: Container[str] = (), shown: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**given` an option for each setting; it gets those that the user gave.

    Args:
        names: the settings; all, where none is named. A parameter of the command's own replaces its setting.
        but: settings that are left out.
        several: settings that take several values, separated by commas.
        shown: the default that the help shows, where it is another than that of `TrainConfig`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = signature(command, eval_str=True).parameters
        own = [parameter for parameter in parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        chosen = [name for name in names or FIELDS if name not in but and name not in parameters]
        ours = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, several, shown or {}))
            for name in chosen
        ]

        @wraps(command)
        def run(**everything: Any) -> None:
            missing = {name for name in chosen if everything[name] in (None, (), [])}
            command(**{name: value for name, value in everything.items() if name not in missing})

        together = [*ours, *(parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own)]
        run.__signature__ = signature(command).replace(parameters=together)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in together}
        return run

    return decorate


def _annotation(name: str, several: Container[str], shown: Mapping[str, str]) -> Any:
    """The type of a setting's parameter, with its option."""
    item, default = FIELDS[name], getattr(DEFAULTS, name)
    known = about(item)
    names = [option(name), *([f"{option(name)}s"] if name in PLURALS else [])]
    kind: Any = str | None
    metavar = known.metavar or kind_of(item).metavar
    if name in ("set", "plugins"):
        kind = list[str] | None
    elif isinstance(default, bool) and name not in several:
        kind, names = bool | None, [f"{option(name)}/--no-{option(name)[2:]}"]
    if name in several and name not in LISTS:
        metavar = f"{metavar or 'BOOL'},..."
    if not (text := known.otherwise) and default not in (None, False, (), {}):
        text = f"{default:g}" if isinstance(default, float) else str(default)
    text = shown.get(name, text)
    return Annotated[
        kind,
        typer.Option(
            *names,
            help=known.help + (f" (default: {text})" if text else ""),
            metavar=metavar or None,
            rich_help_panel=panel_of(name),
        ),
    ]


# Reading


def check_single(command: str, given: Mapping[str, Any], names: Iterable[str], instead: str) -> None:
    """Make sure that these settings have one value; `instead` is the remedy.

    Raises:
        InputError: one has several.
    """
    for name in names:
        text = str(given.get(name, ""))
        if "," in text:
            raise InputError(f"{option(name)} must be one name in dgrad {command}; got {text}: {instead}")


def check_length(given: Mapping[str, Any]) -> None:
    """Make sure that not both epochs and steps are given.

    Raises:
        InputError: they are.
    """
    if "epochs" in given and "steps" in given:
        raise InputError(
            f"--epochs {given['epochs']} and --steps {given['steps']} exclude each other; give one of them"
        )


def single_set(command: str, estimator: str, texts: Iterable[str], instead: str) -> dict[str, str]:
    """The hyper-parameters of one estimator that `--set` gives, a value each.

    Raises:
        InputError: a text cannot be read, has several values, or is of another estimator.
    """
    given = read_set(texts)
    check_owners(given, [estimator])
    for name, values in given.items():
        if len(values) > 1:
            raise InputError(f"--set {name} must be one value in dgrad {command}; got {','.join(values)}: {instead}")
    return {name: value for name, (value,) in set_of(estimator, given).items()}


def read_run(given: Mapping[str, Any], file: Path | None) -> TrainConfig:
    """The configuration of one run: options go before the file of settings, and that before the defaults.

    Raises:
        InputError: a setting cannot be, or has several values.
    """
    several = "dgrad compare and dgrad sweep take several"
    check_single("train", given, ["estimator"], several)
    check_single("train", given, ["latent"], "dgrad sweep takes several")
    check_length(given)
    table = {} if file is None else with_names(read_toml(file))
    settings = {**table, **given}
    if "epochs" in given:
        settings["steps"] = None
    before = str(table.get("estimator", DEFAULTS.estimator))
    estimator = str(settings.get("estimator", before))
    own = table.get("set", {})
    if estimator != before:  # another estimator's hyper-parameters mean nothing to this one
        own = {name: value for name, value in own.items() if name.startswith(f"{estimator}.")}
    check_owners(own, [estimator])
    settings["set"] = set_of(estimator, own) | single_set("train", estimator, given.get("set", ()), several)
    return configure(settings)


def read_overrides(given: Mapping[str, Any], seeds: int | None = None) -> dict[str, Any]:
    """The settings that options with several values ask for, as a recipe has them.

    Raises:
        InputError: a text cannot be read, or options exclude each other.

    >>> read_overrides({"lr": "0.1,0.2", "hidden": "400,200", "set": ["direct.epsilon=1"]}, 2)
    {'lr': ['0.1', '0.2'], 'hidden': '400,200', 'set': {'direct.epsilon': ['1']}, 'seed': [0, 1]}
    """
    overrides = {name: value if name in LISTS else _listed(name, value) for name, value in given.items()}
    if seeds is not None:
        if "seed" in overrides:
            raise InputError("--seed and --seeds exclude each other; give one of them")
        overrides["seed"] = list(range(seeds))
    return overrides


def _listed(name: str, given: Any) -> Any:
    if name == "set":
        return read_set(given)
    values = [value.strip() for value in given.split(",")]
    if not all(values):
        raise InputError(f"{option(name)} expects a value, or several separated by commas; got {given!r}")
    return values
