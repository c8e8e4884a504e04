"""Several trainings that belong together: which they are, what is left to do of them, what came of them. May import all of the core.

Each is an ordinary run in a directory of its own. What is finished is not trained again, and what is half finished goes on.
`dgrad compare` trains them one after the other in its own process, `dgrad sweep` in processes or Slurm jobs (`dgrad.launchers`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dgrad import registry
from dgrad.config import TrainConfig, configure, option
from dgrad.data import Dataset
from dgrad.errors import InputError, unknown_name
from dgrad.hyperparameters import defaults_of
from dgrad.listener import Listener
from dgrad.pictures import RUN_PICTURES
from dgrad.runs import Run, build_dataset, build_model, find_dataset, resolve
from dgrad.training import Trainer, merit, resume
from dgrad.variants import file_name

LISTS = ("hidden", "attributes", "plugins")
"""Settings whose one value is a list; several values of these are a list of lists."""
LONGEST_NAME = 200
"""Bytes of a run directory's name: file systems take 255, and temporary files beside it have longer ones."""


@dataclass(frozen=True)
class Experiment:
    """One of several trainings.

    Attributes:
        label: what tells it from the others, but for the seed.
        config: everything about the run.
        path: its directory.
        limitation: why the estimator cannot work with the latent, or None.
    """

    label: str
    config: TrainConfig
    path: Path
    limitation: str | None

    @property
    def name(self) -> str:
        """The experiment for people."""
        return f"{self.label}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, down to the pictures."""
        return Run(self.path).summary() is not None and all((self.path / name).is_file() for name in RUN_PICTURES)

    @property
    def state(self) -> str:
        """`left out` (see `limitation`), `finished`, `begun` or `to do`."""
        if self.limitation is not None:
            return "left out"
        if self.finished:
            return "finished"
        return "begun" if Run(self.path).checkpoint_file.is_file() else "to do"

    def open(self, listener: Listener | None = None) -> tuple[Trainer, Run]:
        """The trainer and its run: a new one, or the half-finished one at its last checkpoint.

        Raises:
            DgradError: the configuration cannot be, or the run's files are damaged.
        """
        if (self.path / "config.json").is_file():
            return resume(self.path, listener, device=self.config.device)
        trainer = Trainer(self.config, listener)
        return trainer, Run.create(self.path, trainer.config, first_save=trainer.save)

    def create(self) -> None:
        """Make the run directory, unless it is there, so that `dgrad train --resume` begins or continues it."""
        if not (self.path / "config.json").is_file():
            Run.create(self.path, self.config)


def check(experiments: Sequence[Experiment], *, read_data: bool = True) -> None:
    """Make sure, before any of them begins, that all can run: nothing is in their way, their data and models can be had.

    Without `read_data` no data is read or downloaded, nor is a model built, whose size depends on the data.

    Raises:
        InputError: one cannot; or no estimator works with its latent.
        RunError: the data could not be downloaded.
    """
    if all(experiment.limitation is not None for experiment in experiments):
        reasons = "; ".join(dict.fromkeys(str(experiment.limitation) for experiment in experiments))
        latents = ", ".join(dict.fromkeys(experiment.config.latent for experiment in experiments))
        raise InputError(f"none of the estimators works with latent {latents}: {reasons}")
    for experiment in experiments:
        _check_place(experiment)
    datasets: dict[Any, Dataset] = {}
    for config in {experiment.label: experiment.config for experiment in experiments}.values():
        if not read_data:
            find_dataset(config)
            continue
        source = (config.dataset, config.data_root, config.attributes)
        if source not in datasets:
            datasets[source] = build_dataset(config)
        build_model(config, datasets[source].image_shape)


def _check_place(experiment: Experiment) -> None:
    """Make sure that the run can be made, or is the one that is asked for."""
    path = experiment.path
    if not (path / "config.json").is_file():
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} holds files but no run; choose another --out, or move them away")
        Run.check_free(path)
        return
    asked, found = deciding(experiment.config), deciding(Run(path).config)
    differences = [
        f"{option(name)} {_shown(found[name])} where {_shown(asked[name])} is asked for"
        for name in asked
        if asked[name] != found[name]
    ]
    if differences:
        raise InputError(
            f"{path} is a run with {', '.join(differences)}; give the options it was begun with, or choose another --out"
        )


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's figures, as JSON has them: all but the device."""
    settings: dict[str, Any] = json.loads(config.to_json())
    del settings["device"]
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    return (",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "none"


# A sweep: every combination of values


def expand(recipe: Mapping[str, Any], out: Path, overrides: Mapping[str, Any] | None = None) -> list[Experiment]:
    """Every combination of the values in a recipe, all with the first seed, then all with the next. Nothing is written.

    A run that is in `out` already, by whatever name, is found by its configuration; others get the directory
    `out/ESTIMATOR-LATENT-NAME=VALUE-seedN`, with the names of what has several values.

    Args:
        recipe: settings of a run by their names, each with one value or a list of values to be taken in turn; `set`, a table of
            hyper-parameters, each of all estimators (`epsilon`) or of one (`direct.epsilon`), in the same way; `runs`, a list of tables
            of settings on top of the common ones, each expanded by itself, which may have a `name` in the place of estimator and latent.
        out: the directory of the runs.
        overrides: settings on top of everything, as in a recipe.

    Raises:
        InputError: a name or a value cannot be, or two different combinations have the same name.

    >>> [run.path.name for run in expand({"estimator": ["rloo", "leg"], "lr": [0.001, 0.01], "epochs": 5}, Path())]
    ['rloo-20x10-lr=0.001-seed0', 'rloo-20x10-lr=0.01-seed0', 'leg-20x10-lr=0.001-seed0', 'leg-20x10-lr=0.01-seed0']
    """
    common = _with_names(recipe)
    tables = common.pop("runs", [{}])
    if not (isinstance(tables, list) and tables and all(isinstance(table, Mapping) for table in tables)):
        raise InputError(f"runs must be a list of tables of settings, [[runs]]; got {tables!r}")
    over = _with_names(overrides or {})
    there = {json.dumps(deciding(run.config)): run.path for run in _runs_in(out)}
    pairs = [pair for table in tables for pair in _combinations(_on_top(_on_top(common, _with_names(table)), over))]
    _check_labels(pairs)
    experiments = []
    for label, config in sorted(pairs, key=lambda pair: pair[1].seed):
        traits = registry.estimator(config.estimator, **config.set).traits
        config = resolve(replace(config, kl=config.kl or ("inside" if traits.kl_inside else "outside")))
        path = out / f"{file_name(label)}-seed{config.seed}"
        if len(path.name.encode()) > LONGEST_NAME:
            raise InputError(
                f"the name of {path} has more than {LONGEST_NAME} bytes; vary less at once, or name its runs"
            )
        path = there.get(json.dumps(deciding(config)), path)
        experiments.append(Experiment(label, config, path, traits.limitation(registry.latent(config.latent))))
    return experiments


def _with_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the names of `TrainConfig`, and the hyper-parameters by `NAME` or `ESTIMATOR.NAME`."""
    names = {"plugin": "plugins"}
    settings = {names.get(name, name).replace("-", "_"): value for name, value in table.items()}
    if "set" in settings:
        if not isinstance(settings["set"], Mapping):
            raise InputError(f"set must be a table of names and values; got {settings['set']!r}")
        flat: dict[str, Any] = {}
        for name, value in settings["set"].items():
            # TOML makes a table of `direct.epsilon = 1`
            inner = (
                {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
            )
            for key, one in inner.items():
                owner, dot, last = key.rpartition(".")
                flat[f"{owner}{dot}{last.replace('-', '_')}"] = one
        settings["set"] = flat
    return settings


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
            raise unknown_name("setting", setting, (*(option(each)[2:] for each in known), "name", "runs"))
    listed = {setting: _values(setting, value) for setting, value in axes.items()}
    estimators = [str(estimator) for estimator in listed["estimator"]]
    for estimator in estimators:
        registry.registry().factory("estimators", estimator)
    for key in hyperparameters:
        owner = key.rpartition(".")[0]
        if owner and owner not in estimators:
            raise unknown_name(f"estimator of {key}:", owner, estimators, "Name it among the estimators too.")
    for chosen in product(*listed.values()):
        settings = dict(zip(listed, chosen, strict=True))
        ours = _hyperparameters_of(str(settings["estimator"]), hyperparameters)
        for values in product(*ours.values()):
            settings["set"] = dict(zip(ours, map(str, values), strict=True))
            shown = {
                each: settings[each]
                for each in listed
                if each not in ("seed", "latent", "estimator") and len(listed[each]) > 1
            }
            shown |= {key: settings["set"][key] for key in ours if len(ours[key]) > 1}
            first = [str(name)] if name is not None else []
            first += [str(settings[each]) for each in ("estimator", "latent") if name is None or len(listed[each]) > 1]
            label = " ".join([*first, *(f"{key.replace('_', '-')}={_shown(value)}" for key, value in shown.items())])
            yield label, _configured(label, settings, hyperparameters)


def _values(name: str, value: Any) -> list[Any]:
    """The values of a setting that a recipe lists."""
    if name in LISTS:
        several = isinstance(value, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in value)
        return list(value) if several else [value]
    values = list(dict.fromkeys(map(str, value))) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise InputError(f"{name} must have a value, or a list of values to be taken in turn; got an empty list")
    return values


def _hyperparameters_of(estimator: str, given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each hyper-parameter of one estimator: those named with it go before those for all."""
    general = {key: value for key, value in given.items() if "." not in key}
    own = {key.rpartition(".")[2]: value for key, value in given.items() if key.rpartition(".")[0] == estimator}
    return {key: _values(key, value) for key, value in {**general, **own}.items()}


def _configured(label: str, settings: dict[str, Any], hyperparameters: Mapping[str, Any]) -> TrainConfig:
    try:
        config = configure(settings)
        registry.estimator(config.estimator, **config.set)
        registry.latent(config.latent)
        return config
    except InputError as error:
        known = defaults_of(registry.registry().factory("estimators", str(settings["estimator"])))
        foreign = [key for key in hyperparameters if "." not in key and key not in known]
        remedy = f"; write ESTIMATOR.{foreign[0]} to give it to one estimator alone" if foreign else ""
        raise InputError(f"{label}: {error}{remedy}") from None


def _check_labels(pairs: Sequence[tuple[str, TrainConfig]]) -> None:
    """Make sure that no combination is there twice, and that each has a label of its own."""
    configs: dict[tuple[str, int], TrainConfig] = {}
    for label, config in pairs:
        key = (file_name(label), config.seed)
        if key in configs:
            remedy = "leave one of them out" if configs[key] == config else "give each of these runs a name"
            raise InputError(f"there are two runs {label!r} with seed {config.seed}; {remedy}")
        configs[key] = config


# What came of it


@dataclass(frozen=True)
class Combination:
    """What came of the same settings with several seeds; means are over those that are finished.

    Attributes:
        label: what tells it from the others.
        config: the settings, without the seed.
        seeds: how many there are.
        finished: how many of them are finished.
        best: whether it is the best of those with the same data, latent and labels that are wholly finished, by the validation figure that
            also chose their weights.
        figures: for each of valid_bound, test_bound, test_reconstruction (the likelihood's unit, the lower the better), accuracy (test,
            with labels only) and seconds: the mean, the standard deviation (None with one seed) and the values of the seeds.
        unit: of the bounds.
        problem: why it, or some of its seeds, are missing.
    """

    label: str
    config: dict[str, Any]
    seeds: int
    finished: int
    best: bool
    figures: dict[str, dict[str, Any]]
    unit: str | None
    problem: str | None


@dataclass(frozen=True)
class Results:
    """What came of a sweep.

    Attributes:
        combinations: those with the same data, latent and labels together, best first.
        runs: each run: its directory's name, label, seed, state, problem, and its summary, or None.
    """

    combinations: list[Combination]
    runs: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def collect(experiments: Sequence[Experiment], problems: Mapping[Path, str]) -> Results:
    """Read the runs back.

    Args:
        problems: why a run failed, by its path.
    """
    runs = [_row(experiment, problems.get(experiment.path)) for experiment in experiments]
    groups: dict[tuple[Any, ...], dict[str, list[int]]] = {}
    for index, experiment in enumerate(experiments):
        config = experiment.config
        comparable = (
            config.dataset,
            config.binarize,
            config.likelihood,
            config.latent,
            config.labels,
            config.attributes,
            config.criterion,
        )
        groups.setdefault(comparable, {}).setdefault(experiment.label, []).append(index)
    combinations = []
    for group in groups.values():
        found = [
            (
                _merit([runs[index] for index in indices], experiments[indices[0]].config.criterion),
                _combination(experiments[indices[0]], [runs[index] for index in indices]),
            )
            for indices in group.values()
        ]
        found.sort(key=lambda pair: pair[0], reverse=True)
        best = next((one for _, one in found if one.finished == one.seeds), None)
        combinations += [replace(one, best=one is best) for _, one in found]
    return Results(combinations, runs)


def _row(experiment: Experiment, problem: str | None) -> dict[str, Any]:
    state = experiment.state
    if state == "left out":
        problem = experiment.limitation
    elif state == "finished":
        problem = None
    elif problem is not None:
        state = "failed"
    return {
        "run": experiment.path.name,
        "label": experiment.label,
        "seed": experiment.config.seed,
        "state": state,
        "problem": problem,
        "summary": Run(experiment.path).summary() if state == "finished" else None,
    }


def _merit(rows: Sequence[Mapping[str, Any]], criterion: str) -> tuple[float, float]:
    """The mean over seeds of what weights are chosen by; less than any other where nothing is finished."""
    merits = [merit(row["summary"]["best"], criterion) for row in rows if row["summary"] is not None]
    if not merits:
        return (-1.0, 0.0)
    return statistics.fmean(one[0] for one in merits), statistics.fmean(one[1] for one in merits)


def _combination(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Combination:
    summaries = [row["summary"] for row in rows if row["summary"] is not None]
    values = {
        "valid_bound": [summary["best"]["valid_bound"] for summary in summaries],
        "test_bound": [summary["test_bound"] for summary in summaries],
        "test_reconstruction": [summary["best"]["test_reconstruction"] for summary in summaries],
        "accuracy": [summary["accuracy"] for summary in summaries if "accuracy" in summary],
        "seconds": [summary["seconds"] for summary in summaries],
    }
    config = deciding(experiment.config)
    del config["seed"]
    problems = dict.fromkeys(row["problem"] for row in rows if row["problem"])
    return Combination(
        label=experiment.label,
        config=config,
        seeds=len(rows),
        finished=len(summaries),
        best=False,
        figures={name: _mean_of(listed) for name, listed in values.items() if listed and None not in listed},
        unit=summaries[0]["unit"] if summaries else None,
        problem="; ".join(problems) or None,
    )


def _mean_of(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "standard_deviation": spread(values), "values": list(values)}


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None
