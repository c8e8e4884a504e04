"""Several estimators trained in the same way, several seeds each, and their figures side by side.

Every training is an ordinary run in a directory of its own, which `dgrad evaluate` and the others read. A finished run
is not trained again and a half-finished run goes on, so that the same call takes up an interrupted comparison.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.devices import choose_device
from dgrad.errors import DgradError, InputError
from dgrad.experiments.experiment import Experiment, check
from dgrad.experiments.results import code_values, spread
from dgrad.experiments.variants import Variant
from dgrad.training.build import Build
from dgrad.training.choices import lr_of_model
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Interrupted, Trainer


def plan(config: TrainConfig, variants: Sequence[Variant], seeds: int, out: Path) -> list[Experiment]:
    """The runs of a comparison: every variant with the first seed, then with the next. Nothing is written.

    Args:
        config: what all have in common; with `kl` None it is outside for all, whatever suits each by itself.

    Raises:
        InputError: the data, the model or the device cannot be; no estimator works with the latent; or one of the paths
            holds files that are no run, or a run of another configuration.
    """
    if seeds < 1:
        raise InputError(f"--seeds must be a whole number of at least 1; got {seeds}")
    choose_device(config.device)
    # One rate for all: an estimator's own would favour it.
    common = replace(config, kl=config.kl or "outside", lr=config.lr or lr_of_model(config.model))
    entries = []
    for seed in range(seeds):
        for variant in variants:
            build = Build(replace(common, estimator=variant.estimator, set=dict(variant.set), seed=seed))
            path = out / f"{variant.file_name}-seed{seed}"
            entries.append(Experiment(variant.label, build.settings, path, build.why_unsupported))
    check(entries)
    return entries


def train_all(entries: Sequence[Experiment], train: Callable[[Experiment], object]) -> dict[Path, str]:
    """Train what is not finished, one after the other; what fails is left behind and the others go on.

    Args:
        train: trains one entry (`entry.open`, `Trainer.train`, pictures).

    Returns:
        Why an entry failed, in one line, by its path.

    Raises:
        Interrupted: somebody asked to stop.
        OSError: the disk is full, or the like: nothing of an estimator's making.
    """
    problems: dict[Path, str] = {}
    warm: set[str] = set()
    for entry in entries:
        if entry.why_unsupported is not None:
            problems[entry.path] = entry.why_unsupported
            continue
        try:
            if entry.finished:
                continue
            if entry.label not in warm:
                # What torch does once in a process, at the first step of its kind, is not to count as anybody's time.
                Trainer(entry.config).train_step()
                warm.add(entry.label)
            train(entry)
        except (Interrupted, OSError):
            raise
        except Exception as error:  # whatever an estimator does
            text = " ".join(str(error).split())
            problems[entry.path] = text if isinstance(error, DgradError) else f"{type(error).__name__}: {text}"
    return problems


@dataclass(frozen=True)
class Row:
    """The figures of one variant. Bounds are in the likelihood's unit (nats), the lower the better.

    Means are over the finished seeds.

    Attributes:
        label: the name, with the hyper-parameters that tell it from its siblings.
        set: its hyper-parameters as given.
        rank: by `valid_bound`, 1 for the best; None where no seed was finished.
        valid_bound: the best validation bound of the run.
        valid_bound_spread: its standard deviation over seeds; None with one seed.
        test_bound: of the weights that were best by validation.
        test_bound_spread: the same of the test bound.
        valid_bound_at_equal_time: the best validation bound after `Comparison.equal_seconds`; None where a seed had not
            been evaluated.
        distinct_codes: among the most probable codes of the test images; None where runs of earlier versions lack it.
        information: of the test images in the code, in nats; None also for a latent without probabilities.
        seconds: of the run, with the evaluations on the validation images and the checkpoints; without the final test.
        evaluations: of the decoder, for one example in one step; None where it cannot work with the latent.
        bits_per_dimension: the mean of the test figure; None where the likelihood has none or pixels are binary.
        psnr: the same, in decibels.
        runs: each seed: path, seed, problem, summary, and metrics of each evaluation.
        curve: for each evaluation epoch and step, mean seconds, and the mean, least and greatest validation bound over
            seeds.
        problem: why it, or some of its seeds, failed.
    """

    estimator: str
    label: str
    set: dict[str, str]
    rank: int | None
    valid_bound: float | None
    valid_bound_spread: float | None
    test_bound: float | None
    test_bound_spread: float | None
    valid_bound_at_equal_time: float | None
    distinct_codes: float | None
    information: float | None
    seconds: float | None
    evaluations: int | None
    bits_per_dimension: float | None
    psnr: float | None
    runs: list[dict[str, Any]]
    curve: list[dict[str, float]]
    problem: str | None


@dataclass(frozen=True)
class Comparison:
    """All rows, best first and failed ones last, and what they have in common.

    Attributes:
        equal_seconds: what the fastest estimator took, the longest of its seeds; None where nothing was finished.
        unit: of the bounds.
        config: the settings that all runs share.
    """

    rows: list[Row]
    seeds: int
    equal_seconds: float | None
    unit: str
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def summarize(entries: Sequence[Experiment], problems: Mapping[Path, str]) -> Comparison:
    """Read the runs back and put the variants side by side."""
    groups: dict[str, list[Experiment]] = {}
    for entry in entries:
        groups.setdefault(entry.label, []).append(entry)
    runs = {label: [_result(entry, problems.get(entry.path)) for entry in group] for label, group in groups.items()}
    finished = {label: [run for run in results if run["problem"] is None] for label, results in runs.items()}
    times = {label: [run["summary"]["seconds"] for run in done] for label, done in finished.items() if done}
    fastest = min(times, key=lambda label: statistics.fmean(times[label]), default=None)
    equal_seconds = max(times[fastest]) if fastest is not None else None
    bounds = {label: statistics.fmean(_best(run) for run in finished[label]) for label in times}
    ranked = sorted(bounds, key=bounds.__getitem__)
    layer = registry.latent(entries[0].config.latent)
    rows = []
    for label in ranked + [label for label in groups if label not in bounds]:
        first, done = groups[label][0], finished[label]
        tests = [run["summary"]["test_bound"] for run in done]
        codes = code_values([run["summary"] for run in done])
        early = [_best_until(run, equal_seconds) for run in done]
        estimator = registry.estimator(first.config.estimator, **first.config.set)
        rows.append(
            Row(
                estimator=first.config.estimator,
                label=label,
                set=dict(first.config.set),
                rank=ranked.index(label) + 1 if done else None,
                valid_bound=bounds.get(label),
                valid_bound_spread=spread([_best(run) for run in done]),
                test_bound=statistics.fmean(tests) if tests else None,
                test_bound_spread=spread(tests),
                valid_bound_at_equal_time=_mean_of_all(early),
                **{name: _mean_of_all(codes[name]) for name in ("distinct_codes", "information")},
                seconds=statistics.fmean(times[label]) if done else None,
                evaluations=estimator.traits.evaluations(layer) if first.why_unsupported is None else None,
                bits_per_dimension=_test_figure(done, "bits_per_dimension"),
                psnr=_test_figure(done, "psnr"),
                runs=runs[label],
                curve=_curve(done),
                problem=_problem(runs[label]),
            )
        )
    shared: dict[str, Any] = json.loads(entries[0].config.to_json())
    for name in ("estimator", "set", "seed"):
        del shared[name]
    units = {run["summary"]["unit"] for done in finished.values() for run in done}
    return Comparison(rows, len(groups[rows[0].label]), equal_seconds, units.pop() if units else "", shared)


def _result(entry: Experiment, problem: str | None) -> dict[str, Any]:
    run = Run(entry.path)
    return {
        "path": str(entry.path),
        "seed": entry.config.seed,
        "problem": problem,
        "summary": run.summary() if problem is None else None,
        "metrics": run.metrics(),
    }


def _best(run: dict[str, Any]) -> float:
    return float(run["summary"]["best"]["valid_bound"])


def _best_until(run: dict[str, Any], seconds: float | None) -> float | None:
    return min((line["valid_bound"] for line in run["metrics"] if line["seconds"] <= (seconds or 0.0)), default=None)


def _test_figure(runs: list[dict[str, Any]], name: str) -> float | None:
    return _mean_of_all([run["summary"]["best"].get(f"test_{name}") for run in runs])


def _mean_of_all(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _curve(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The evaluations that all runs have, by step, with the bound over seeds."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for line in run["metrics"]:
            lines.setdefault(line["step"], []).append(line)
    return [
        {
            "epoch": together[0]["epoch"],
            "step": step,
            "seconds": statistics.fmean(line["seconds"] for line in together),
            "valid_bound": statistics.fmean(line["valid_bound"] for line in together),
            "least": min(line["valid_bound"] for line in together),
            "greatest": max(line["valid_bound"] for line in together),
        }
        for step, together in sorted(lines.items())
        if len(together) == len(runs)
    ]


def _problem(runs: list[dict[str, Any]]) -> str | None:
    failed = [run for run in runs if run["problem"] is not None]
    if not failed:
        return None
    reasons = "; ".join(dict.fromkeys(run["problem"] for run in failed))
    return reasons if len(failed) == len(runs) else f"{len(failed)} of {len(runs)} seeds failed: {reasons}"
