"""Training events: `dgrad train --plugin examples/events.py` writes `figures.csv` into the run directory."""

import csv
import sys
from pathlib import Path

import dgrad

COLUMNS = ("step", "train_loss", "valid_bound", "valid_kl")


@dgrad.hookimpl
def dgrad_train_start(run, config):
    # To the standard error: the standard output belongs to the result, and with --json to nothing else.
    print(f"{config.estimator} on {config.dataset}: figures go to {run / 'figures.csv'}", file=sys.stderr)


@dgrad.hookimpl
def dgrad_evaluation_end(run, metrics):
    """A row for each evaluation. After a kill, a resumed run measures a few again; the later row of a step counts."""
    path = Path(run) / "figures.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(COLUMNS)
        rows.writerow(metrics[column] for column in COLUMNS)


@dgrad.hookimpl
def dgrad_train_end(run, summary):
    with (run / "figures.csv").open(encoding="utf-8") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["valid_bound"]))
    print(f"best validation bound {float(best['valid_bound']):.2f} at step {best['step']}", file=sys.stderr)
