"""The tables of docs/choosing.md: `python -m benchmarks.choosing COMPARISON --steps steps.json`.

COMPARISON is a directory of `dgrad compare`, steps.json comes from `python -m benchmarks`. Time is epochs times the
step's ratio to Gumbel-softmax's, measured side by side, because the seconds of long runs also measure what else the
machine did.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import dgrad
from dgrad.training.run_directory import Run

GRACE = 1.05
"""Bounds are measured once an epoch: one that ends this little after time is up still counts."""


def finished_runs(directory: Path) -> dict[str, list[Run]]:
    """The finished runs of each variant, by the name of their directories without the seed."""
    runs = defaultdict(list)
    for path in sorted(directory.glob("*-seed*")):
        run = Run(path)
        if run.summary() is not None:
            runs[path.name.rpartition("-seed")[0]].append(run)
    return dict(runs)


def row(label: str, runs: list[Run], seeds: set[int], ratios: dict[str, float]) -> dict[str, Any]:
    """One variant: bounds at equal epochs, and at the time that Gumbel-softmax takes for all its epochs.

    Args:
        seeds: those that every variant has; ranks rest on them. The test bound's mean is over all seeds of the variant.
    """
    config = runs[0].config
    ratio = ratios.get(config.estimator) if _times_apply(config.estimator, config.set) else None
    tests = [(run.summary() or {})["test_bound"] for run in runs]
    compared = [run for run in runs if run.config.seed in seeds]
    early = [] if ratio is None else [_bound_until(run.metrics(), ratio) for run in compared]
    bounds = [bound for bound in early if bound is not None]
    estimator = dgrad.estimator(config.estimator, **config.set)
    return {
        "label": label,
        "valid": statistics.fmean((run.summary() or {})["best"]["valid_bound"] for run in compared),
        "test": statistics.fmean(tests),
        "spread": statistics.stdev(tests) if len(tests) > 1 else None,
        "early": statistics.fmean(bounds) if bounds and len(bounds) == len(early) else None,
        "ratio": ratio,
        "evaluations": estimator.traits.evaluations(dgrad.latent(config.latent)),
        "seeds": len(runs),
    }


def _bound_until(lines: list[dict[str, Any]], ratio: float) -> float | None:
    last = GRACE * lines[-1]["epoch"]
    return min((line["valid_bound"] for line in lines if line["epoch"] * ratio <= last), default=None)


def _times_apply(estimator: str, given: dict[str, str]) -> bool:
    """Whether the benchmark's step, with default hyper-parameters, is this variant's."""
    default, own = dgrad.estimator(estimator), dgrad.estimator(estimator, **given)
    layer = dgrad.latent("20x2")
    return default.traits.evaluations(layer) == own.traits.evaluations(layer)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--steps", type=Path, required=True, help="steps.json of python -m benchmarks")
    arguments = parser.parse_args()
    runs = finished_runs(arguments.comparison)
    latent = next(iter(runs.values()))[0].config.latent
    steps = json.loads(arguments.steps.read_text(encoding="utf-8"))["steps"][latent]
    ratios = {name: figures["median_ratio"] for name, figures in steps.items()}
    seeds = set.intersection(*({run.config.seed for run in group} for group in runs.values()))
    rows = sorted((row(label, group, seeds, ratios) for label, group in runs.items()), key=lambda each: each["valid"])
    timed = sorted((each for each in rows if each["early"] is not None), key=lambda each: each["early"])
    places = {each["label"]: str(place) for place, each in enumerate(timed, 1)}
    print("| rank | estimator | evaluations | validation | test | seeds | step | validation at equal time | rank |")
    print("|---|---|---|---|---|---|---|---|---|")
    for place, each in enumerate(rows, 1):
        spread = f" ± {each['spread']:.2f}" if each["spread"] is not None else ""
        early = f"{each['early']:.2f}" if each["early"] is not None else ""
        ratio = f"{each['ratio']:.2f}" if each["ratio"] is not None else ""
        label = each["label"].replace("-samples=", " samples=").replace("-baseline=", " baseline=")
        print(
            f"| {place} | `{label}` | {each['evaluations']} | {each['valid']:.2f} | {each['test']:.2f}{spread} | "
            f"{each['seeds']} | {ratio} | {early} | {places.get(each['label'], '')} |"
        )


if __name__ == "__main__":
    main()
