"""`dgrad sweep`: every combination of settings. Torch and the core are imported inside the command alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dgrad.config import read_toml
from dgrad.errors import InputError, RunError
from dgrad.experiments.launchers import Job, run_here, run_submitted, submitit_executor
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.display import OF_GREY_PIXELS, duration, print_json, print_table, with_spread
from dgrad_cli.options import FIELDS, Devices, DryRun, Jobs, Json, Quiet, Seeds, read_overrides, takes_settings
from dgrad_cli.writing import as_text, check_directory

if TYPE_CHECKING:
    from dgrad.experiments.experiment import Experiment
    from dgrad.experiments.results import Combination, Results

STOPPED = "stopped, everything so far is kept; give the same command again to go on"
CLUSTERS = {"slurm": "slurm", "submitit-local": "local"}
"""Launchers by submitit, and what it calls them."""


@takes_settings(several=FIELDS)
def sweep(
    *,
    out: Annotated[
        Path, typer.Option(help="The runs' directory; the same command again does what is missing.", metavar="DIR")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of settings, each with a value or a list (docs/sweeping.md). Options go before it.",
            metavar="FILE.toml",
        ),
    ] = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    device: Devices = None,
    launcher: Annotated[
        str,
        typer.Option(
            help="local (processes here), slurm (a job each; extra: slurm), submitit-local (to try that).",
            metavar="NAME",
        ),
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the Slurm jobs: time=120 (minutes), partition=gpu, gpus_per_node=1 ...; repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Train every combination of settings, several at a time; what is finished is not trained again.

    Any setting takes several values, separated by commas. Each combination is an ordinary run in a directory of its
    own. The best are chosen by validation; test images choose nothing.
    """
    check_directory(out)
    load_plugins(given.get("plugins"))
    recipe = {} if config is None else read_toml(config)
    overrides = read_overrides(given, seeds)
    _, results = run_recipe(
        recipe, out, overrides, jobs, device, launcher=launcher, slurm=slurm or (), dry_run=dry_run, quiet=quiet
    )
    if json:
        print_json(results.to_json())
    else:
        show_results(results, out, dry_run=dry_run)
    check_failures(results, f"; see {out / 'logs'}")


def run_recipe(
    recipe: Mapping[str, Any],
    out: Path,
    overrides: Mapping[str, Any],
    jobs: int | None,
    device: str | None,
    *,
    launcher: str = "local",
    slurm: Sequence[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> tuple[list[Experiment], Results]:
    """Train what is missing of a recipe's runs (`dgrad.experiments.grid.expand`).

    With `dry_run` nothing is trained or written, and no data is read.

    Returns:
        The runs, and what came of them, which is also in `out/results.json`.

    Raises:
        Interrupted: a signal stopped it.
    """
    from dgrad.devices import all_devices
    from dgrad.experiments.experiment import check
    from dgrad.experiments.grid import expand
    from dgrad.experiments.results import collect
    from dgrad.files.atomic import write_text
    from dgrad.pictures.of_a_run import draw_missing_of

    if launcher not in ("local", *CLUSTERS):
        raise InputError(f"--launcher must be local, {' or '.join(CLUSTERS)}; got {launcher!r}")
    if slurm and launcher == "local":
        raise InputError("--slurm is for Slurm's jobs; give --launcher slurm too, or leave it out")
    if launcher in CLUSTERS and device is not None and "," in device:
        raise InputError(
            f"--device {device}: a Slurm job has one run, on what it is given; expected one name, such as cuda"
        )
    experiments = expand(recipe, out, overrides)
    devices = all_devices(device) if launcher == "local" else [device or "auto"]
    check(experiments, read_data=not dry_run)
    if dry_run:
        return experiments, collect(experiments, {})
    executor = submitit_executor(out / "slurm", CLUSTERS[launcher], slurm, jobs) if launcher in CLUSTERS else None
    out.mkdir(parents=True, exist_ok=True)
    monitor = _Monitor(experiments, Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet))
    monitor.announce(out)
    todo = [_job(experiment, out) for experiment in experiments if experiment.state in ("begun", "to do")]
    if executor is None:
        received = run_here(todo, devices=devices, at_once=jobs or len(devices), begin=monitor.begin, end=monitor.end)
    else:
        todo = [Job(job.name, (*job.command, "--device", devices[0]), job.log) for job in todo]
        received = run_submitted(todo, executor, begin=monitor.begin, end=monitor.end)
    draw_missing_of(experiments, monitor.say)
    results = collect(experiments, monitor.problems)
    write_text(out / "results.json", as_text(results.to_json()))
    stop_if(received)
    return experiments, results


def _job(experiment: Experiment, out: Path) -> Job:
    """The command that trains one run, from its beginning or its last checkpoint."""
    words = ("-m", "dgrad_cli.worker", "train", "--quiet", "--resume", str(experiment.path.absolute()))
    return Job(
        experiment.path.name, (sys.executable, *words), (out / "logs" / f"{experiment.path.name}.log").absolute()
    )


def stop_if(received: int | None) -> None:
    """End, as a signal asked for; None for no signal."""
    if received is not None:
        from dgrad.training.trainer import Interrupted

        interruption = Interrupted(STOPPED)
        interruption.exit_code = 128 + received
        raise interruption


def check_failures(results: Results, hint: str = "") -> None:
    """Raise a RunError where runs failed."""
    if failed := [row for row in results.runs if row["state"] == "failed"]:
        first = f"{failed[0]['run']}: {failed[0]['problem']}"
        raise RunError(f"{len(failed)} of {len(results.runs)} runs failed, the first of them {first}{hint}")


# What comes of it


class _Monitor:
    """Says what happens, and remembers what failed."""

    def __init__(self, experiments: Sequence[Experiment], notes: Console) -> None:
        self.experiments = {experiment.path.name: experiment for experiment in experiments}
        self.notes = notes
        self.problems: dict[Path, str] = {}

    def announce(self, out: Path) -> None:
        """Say what will not be trained."""
        for line in _reasons(
            {experiment.label: experiment.why_unsupported for experiment in self.experiments.values()}
        ):
            self.say(f"left out: {line}")
        if done := sum(experiment.state == "finished" for experiment in self.experiments.values()):
            self.say(f"{done} of {len(self.experiments)} runs in {out} are finished already")

    def begin(self, job: Job) -> None:
        """Make the run directory."""
        experiment = self.experiments[job.name]
        self.say(f"{self._number(job)} {'goes on' if experiment.state == 'begun' else 'begins'}")
        experiment.create()

    def end(self, job: Job, problem: str | None) -> None:
        """See what came of the run."""
        from dgrad.training.run_directory import Run

        experiment = self.experiments[job.name]
        summary = Run(experiment.path).summary()
        if summary is not None:
            accuracy = f", accuracy {_percent(summary['best']['valid_accuracy'])}" if "accuracy" in summary else ""
            bound = f"validation bound {summary['best']['valid_bound']:.2f} {summary['unit']}{accuracy}"
            self.say(f"{self._number(job)}: {bound}, {duration(summary['seconds'])}")
        elif problem is not None:
            self.problems[experiment.path] = problem
            self.say(f"{self._number(job)} failed: {problem}")

    def _number(self, job: Job) -> str:
        number = list(self.experiments).index(job.name) + 1
        return f"{number} of {len(self.experiments)}, {self.experiments[job.name].name}"

    def say(self, text: str) -> None:
        """Print a line for people."""
        self.notes.print(text, markup=False)


def _reasons(problems: Mapping[str, str | None]) -> list[str]:
    """A line for each reason, with the names that it is true of."""
    names: dict[str, list[str]] = {}
    for name, reason in problems.items():
        if reason is not None:
            names.setdefault(reason, []).append(name)
    return [f"{', '.join(those)}: {reason}" for reason, those in names.items()]


def _show_plan(results: Results) -> None:
    print_table(["run", "state"], ((row["run"], row["state"]) for row in results.runs))
    states = [row["state"] for row in results.runs]
    counts = (f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{len(states)} runs: {', '.join(counts)}")
    for line in _reasons({row["label"]: row["problem"] for row in results.runs}):
        print(f"left out: {line}")


def show_results(results: Results, out: Path, *, dry_run: bool = False) -> None:
    """The table, and what is missing in it; before anything is trained, the runs."""
    if dry_run:
        _show_plan(results)
        return
    trained = [one for one in results.combinations if one.figures or one.problem is None]
    columns = {"validation bound": "valid_bound", "test bound": "test_bound"}
    if any(one.config["choose_by"] == "reconstruction" for one in trained):
        columns["test reconstruction"] = "test_reconstruction"
    grey = OF_GREY_PIXELS.items()
    columns |= {title: name for name, title in grey if any(name in one.figures for one in trained)}
    if any("accuracy" in one.figures for one in trained):
        columns["test accuracy"] = "accuracy"
    columns |= {name: key for name, key in CODE_COLUMNS.items() if any(key in one.figures for one in trained)}
    print_table(
        ["", "combination", "seeds", *columns, "seconds"],
        (
            (
                "*" if one.best else "",
                one.label,
                str(one.finished) if one.finished == one.seeds else f"{one.finished} of {one.seeds}",
                *(figure_text(one, name) for name in columns.values()),
                f"{one.figures['seconds']['mean']:.3g}" if "seconds" in one.figures else "-",
            )
            for one in trained
        ),
    )
    units = sorted({one.unit for one in trained if one.unit})
    print(
        f"\nBounds in {' or '.join(units) or 'nats'}, the lower the better; mean ± standard deviation over seeds. "
        "*: the best by validation of those with the same latent, data and labels."
    )
    for state in ("left out", "failed"):
        name = "label" if state == "left out" else "run"
        for line in _reasons({row[name]: row["problem"] for row in results.runs if row["state"] == state}):
            print(f"{state}: {line}")
    print(f"{out}: results.json, logs, and a run directory for each")


CODE_COLUMNS = {"distinct codes": "distinct_codes", "information": "information"}


def figure_text(one: Combination, name: str) -> str:
    """A figure with its spread over seeds."""
    if name not in one.figures:
        return "-"
    mean, deviation = one.figures[name]["mean"], one.figures[name]["standard_deviation"]
    if name == "accuracy":
        return with_spread(100 * mean, None if deviation is None else 100 * deviation) + " %"
    return with_spread(mean, deviation)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
