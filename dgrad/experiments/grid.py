"""A grid of runs: every combination of the values in a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from dgrad import registry
from dgrad.config import LISTS, TrainConfig, configure, option, with_names
from dgrad.errors import InputError, unknown_name
from dgrad.experiments.experiment import Experiment, value_text
from dgrad.experiments.variants import file_name
from dgrad.hyperparameters import check_owners, set_of, with_remedy
from dgrad.training.build import Build
from dgrad.training.figures import figure_settings
from dgrad.training.run_directory import Run

LONGEST_NAME = 200
"""Bytes of a run directory's name: file systems take 255, and temporary files beside it have longer ones."""


def expand(recipe: Mapping[str, Any], out: Path, overrides: Mapping[str, Any] | None = None) -> list[Experiment]:
    """Every combination of the values in a recipe, all with the first seed, then all with the next. Nothing is written.

    A run that is in `out` already, by whatever name, is found by its configuration. Others get the directory
    `out/ESTIMATOR-LATENT-NAME=VALUE-seedN`, with the names of the settings that have several values.

    Args:
        recipe: settings of a run by their names, each with one value or a list of values to be taken in turn. `set` is
            a table of hyper-parameters, each of all estimators (`epsilon`) or of one (`direct.epsilon`), in the same
            way. `runs` is a list of tables of settings on top of the common ones, each expanded by itself. A table may
            have a `name` in the place of estimator and latent.
        overrides: settings on top of everything, as in a recipe.

    Raises:
        InputError: a name or a value cannot be, or two different combinations have the same name.

    >>> [run.path.name for run in expand({"estimator": ["rloo", "leg"], "lr": [0.001, 0.01], "epochs": 5}, Path())]
    ['rloo-20x10-lr=0.001-seed0', 'rloo-20x10-lr=0.01-seed0', 'leg-20x10-lr=0.001-seed0', 'leg-20x10-lr=0.01-seed0']
    """
    common = with_names(recipe)
    tables = common.pop("runs", [{}])
    if not (isinstance(tables, list) and tables and all(isinstance(table, Mapping) for table in tables)):
        raise InputError(f"runs must be a list of tables of settings, [[runs]]; got {tables!r}")
    over = with_names(overrides or {})
    there = {json.dumps(figure_settings(run.config)): run.path for run in _runs_in(out)}
    pairs = [pair for table in tables for pair in _combinations(_on_top(_on_top(common, with_names(table)), over))]
    _check_labels(pairs)
    experiments = []
    for label, config in sorted(pairs, key=lambda pair: pair[1].seed):
        build = Build(config)
        path = out / f"{file_name(label)}-seed{config.seed}"
        if len(path.name.encode()) > LONGEST_NAME:
            raise InputError(
                f"the name of {path} has more than {LONGEST_NAME} bytes; vary less at once, or name its runs"
            )
        path = there.get(json.dumps(figure_settings(build.settings)), path)
        experiments.append(Experiment(label, build.settings, path, build.why_unsupported))
    return experiments


def _on_top(table: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables in one, where `top` wins; of epochs and steps, the other goes."""
    merged = {**table, **top}
    if "set" in table and "set" in top:
        merged["set"] = {**table["set"], **top["set"]}
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if name in top and other not in top:
            merged.pop(other, None)
    if "epochs" in merged and "steps" in merged:
        raise InputError("epochs and steps exclude each other; give one of them")
    return merged


def _runs_in(out: Path) -> Iterator[Run]:
    yield from (Run(file.parent) for file in sorted(out.glob("[!.]*/config.json")))


def _combinations(table: dict[str, Any]) -> Iterator[tuple[str, TrainConfig]]:
    """Label and configuration of every combination of one table."""
    plugins = _values("plugins", table.get("plugins", []))
    if len(plugins) > 1:
        raise InputError("plugins cannot be varied; load them all for all runs")
    for plugin in configure({"plugins": plugins[0]}).plugins:
        registry.load_plugin(plugin)
    name, hyperparameters = table.pop("name", None), table.pop("set", {})
    axes = {"seed": 0, "latent": TrainConfig.latent, "estimator": TrainConfig.estimator, **table}
    known = TrainConfig.__dataclass_fields__
    for setting in axes:
        if setting not in known:
            raise unknown_name("setting", setting, (*(option(known_name)[2:] for known_name in known), "name", "runs"))
    listed = {setting: _values(setting, value) for setting, value in axes.items()}
    estimators = [str(estimator) for estimator in listed["estimator"]]
    for estimator in estimators:
        registry.registry().factory("estimators", estimator)
    check_owners(hyperparameters, estimators)
    for chosen in product(*listed.values()):
        settings = dict(zip(listed, chosen, strict=True))
        own = set_of(str(settings["estimator"]), hyperparameters)
        ours = {key: _values(key, value) for key, value in own.items()}
        for values in product(*ours.values()):
            settings["set"] = dict(zip(ours, map(str, values), strict=True))
            shown = {
                varied: settings[varied]
                for varied in listed
                if varied not in ("seed", "latent", "estimator") and len(listed[varied]) > 1
            }
            shown |= {key: settings["set"][key] for key in ours if len(ours[key]) > 1}
            first = [str(name)] if name is not None else []
            first += [
                str(settings[varied]) for varied in ("estimator", "latent") if name is None or len(listed[varied]) > 1
            ]
            label = " ".join(
                [*first, *(f"{key.replace('_', '-')}={value_text(value)}" for key, value in shown.items())]
            )
            yield label, _configured(label, settings, hyperparameters)


def _values(name: str, value: Any) -> list[Any]:
    """The values of a setting that a recipe lists; several values of a list are a list of lists."""
    if name in LISTS:
        several = isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in value)
        return list(value) if several else [value]
    values = list(dict.fromkeys(map(str, value))) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise InputError(f"{name} must have a value, or a list of values to be taken in turn; got an empty list")
    return values


def _configured(label: str, settings: dict[str, Any], hyperparameters: Mapping[str, Any]) -> TrainConfig:
    try:
        config = configure(settings)
        registry.estimator(config.estimator, **config.set)
        registry.latent(config.latent)
        return config
    except InputError as error:
        factory = registry.registry().factory("estimators", str(settings["estimator"]))
        raise with_remedy(error, label, factory, hyperparameters) from None


def _check_labels(pairs: Sequence[tuple[str, TrainConfig]]) -> None:
    """Make sure that no combination is there twice, and that each has a label of its own."""
    configs: dict[tuple[str, int], TrainConfig] = {}
    for label, config in pairs:
        key = (file_name(label), config.seed)
        if key in configs:
            remedy = "leave one of them out" if configs[key] == config else "give each of these runs a name"
            raise InputError(f"there are two runs {label!r} with seed {config.seed}; {remedy}")
        configs[key] = config
