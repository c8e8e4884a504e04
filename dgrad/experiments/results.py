"""What came of several runs: figures over seeds, best first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dgrad.experiments.experiment import Experiment
from dgrad.training.figures import figure_settings, selection_key
from dgrad.training.run_directory import Run

COMPARABLE = ("dataset", "binarize", "likelihood", "latent", "labels", "attributes", "criterion")
"""What combinations must have in common to be compared."""
OF_GREY_PIXELS = ("bits_per_dimension", "psnr")
"""Test figures of runs whose pixels are not binary."""


@dataclass(frozen=True)
class Combination:
    """What came of the same settings with several seeds; means are over those that are finished.

    Attributes:
        label: what tells it from the others.
        config: the settings, without the seed.
        finished: how many of them are finished.
        best: whether it is the best of those with the same data, latent and labels that are wholly finished. The
            validation figure that chose their weights decides.
        figures: the mean, the standard deviation (None with one seed) and the values of the seeds. They are of
            valid_bound, test_bound and test_reconstruction (the likelihood's unit, the lower the better), and seconds.
            Of the code, among the test images: distinct_codes, information and values_in_use.
            With labels also of accuracy (test), with grey pixels of bits_per_dimension and psnr (test).
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
    """What came of a grid of runs.

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
        comparable = tuple(getattr(config, name) for name in COMPARABLE)
        groups.setdefault(comparable, {}).setdefault(experiment.label, []).append(index)
    combinations = []
    for group in groups.values():
        found = [
            (
                _mean_key([runs[index] for index in indices], experiments[indices[0]].config.criterion),
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
        problem = experiment.why_unsupported
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


def _mean_key(rows: Sequence[Mapping[str, Any]], criterion: str) -> tuple[float, float]:
    """The mean over seeds of the keys that chose their weights; less than any other where nothing is finished."""
    keys = [selection_key(row["summary"]["best"], criterion) for row in rows if row["summary"] is not None]
    if not keys:
        return (-1.0, 0.0)
    return statistics.fmean(one[0] for one in keys), statistics.fmean(one[1] for one in keys)


def _combination(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> Combination:
    summaries = [row["summary"] for row in rows if row["summary"] is not None]
    values = {
        "valid_bound": [summary["best"]["valid_bound"] for summary in summaries],
        "test_bound": [summary["test_bound"] for summary in summaries],
        "test_reconstruction": [summary["best"]["test_reconstruction"] for summary in summaries],
        "accuracy": [summary["accuracy"] for summary in summaries if "accuracy" in summary],
        **{name: [summary["best"].get(f"test_{name}") for summary in summaries] for name in OF_GREY_PIXELS},
        **code_values(summaries),
        "seconds": [summary["seconds"] for summary in summaries],
    }
    config = figure_settings(experiment.config)
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


def code_values(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The figures of the code that tables have a column for, of each summary; None of runs of earlier versions."""
    codes = [summary["best"].get("code", {}) for summary in summaries]
    return {name: [code.get(name) for code in codes] for name in ("distinct_codes", "information", "values_in_use")}


def _mean_of(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "standard_deviation": spread(values), "values": list(values)}


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None
