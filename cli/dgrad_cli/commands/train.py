"""`dgrad train`. Torch and the core's training are imported inside the command alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.config import TrainConfig, option
from dgrad.errors import InputError, RunError
from dgrad.training.processes import ProcessGroup
from dgrad_cli.display import Watcher, code_figures, duration, figures, print_json, print_table, warn_of_collapse
from dgrad_cli.options import Json, Quiet, read_run, takes_settings

if TYPE_CHECKING:
    from dgrad.training.run_directory import Run
    from dgrad.training.seeds import Seeds
    from dgrad.training.trainer import Trainer


def _option(help: str, metavar: str, **more: Any) -> Any:
    return typer.Option(help=help, metavar=metavar, **more)


@takes_settings()
def train(
    *,
    config: Annotated[Path | None, _option("A TOML file of settings, which options go before.", "FILE.toml")] = None,
    out: Annotated[Path | None, _option("The run's directory. (default: runs/DATASET-LATENT-ESTIMATOR)", "DIR")] = None,
    resume: Annotated[Path | None, _option("Continue this run from its last checkpoint.", "RUN")] = None,
    seeds_in_parallel: Annotated[
        int | None, _option("Train so many seeds at once, as DIR/seed0, DIR/seed1 ...", "N", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run at --out.")] = False,
    quiet: Quiet = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Train a discrete variational auto-encoder, evaluate it on test images, and keep everything in a run directory.

    SCHEDULE is a number, or linear, geometric, cosine, exponential, stable-decay or warmup,
    such as cosine:0.01:0.
    """
    group = ProcessGroup.from_environment()
    watcher = Watcher(quiet=quiet, to_stderr=json)
    if resume is not None:
        own = {"config": config, "out": out, "seeds_in_parallel": seeds_in_parallel, "overwrite": overwrite}
        conflicting = [*given, *(name for name, value in own.items() if value)]
        _resume(resume, given, watcher, group, conflicting=conflicting, as_json=json)
        return
    chosen = read_run(given, config)
    if seeds_in_parallel is not None:
        _train_seeds(chosen, seeds_in_parallel, out, watcher, group, overwrite=overwrite, as_json=json)
    else:
        _train(chosen, out, watcher, group, overwrite=overwrite, as_json=json)


def _train(
    config: TrainConfig, out: Path | None, watcher: Watcher, group: ProcessGroup, *, overwrite: bool, as_json: bool
) -> None:
    from dgrad.training.run_directory import Run
    from dgrad.training.trainer import Trainer

    def choose() -> Path:
        path = out or _free_name(config)
        Run.check_free(path, overwrite=overwrite)
        return path

    with group.joined(config.device):
        path = group.from_first(choose)
        trainer = Trainer(config, watcher, group)
        if group.is_first:
            run = Run.create(path, trainer.config, overwrite=overwrite, first_save=trainer.save)
        else:
            run = Run(path)
            trainer.save(run)  # its part of it
        with run.locked() if group.is_first else nullcontext():
            _run(trainer, run, watcher, as_json=as_json)


def _resume(
    path: Path,
    settings: dict[str, Any],
    watcher: Watcher,
    group: ProcessGroup,
    *,
    conflicting: Sequence[str],
    as_json: bool,
) -> None:
    from dgrad.pictures.of_a_run import draw_missing_pictures
    from dgrad.training.run_directory import SEEDS_FILE, Run
    from dgrad.training.trainer import resume

    refused = [option(name) for name in conflicting if name != "device"]
    if refused:
        raise InputError(
            f"--resume continues a run as it was configured; leave out {', '.join(refused)}, or start a new run"
        )
    if (path / SEEDS_FILE).is_file():
        _resume_seeds(path, settings, watcher, group, as_json=as_json)
        return
    run = Run.open(path)
    summary = run.summary()
    if summary is not None:
        if group.is_first:
            draw_missing_pictures(run)
            _report(summary, path, as_json=as_json)
        return
    with run.locked() if group.is_first else nullcontext(), group.joined(settings.get("device", run.config.device)):
        trainer, run = resume(path, watcher, group, **settings)
        _run(trainer, run, watcher, as_json=as_json)


def _free_name(config: TrainConfig) -> Path:
    """`runs/digits-20x10-direct`, with a number behind it where that is taken."""
    name = f"{Path(config.dataset).stem}-{config.latent}-{config.estimator}".replace(":", "-").replace("/", "-")
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _run(trainer: Trainer, run: Run, watcher: Watcher, *, as_json: bool) -> None:
    summary, _ = finish(trainer, run, watcher)
    if trainer.group.is_first:
        _report(summary, run.path, as_json=as_json)


def finish(trainer: Trainer, run: Run, watcher: Watcher) -> tuple[dict[str, Any], list[int]]:
    """Train to the end, with pictures; the summary, and the signals that came too late to stop it.

    Raises:
        Interrupted: a signal asked to stop; its exit code says which.
    """
    from dgrad.pictures.of_a_run import save_run_pictures

    with _stopping_on_signals(trainer.stop, run.path, watcher, alone=trainer.group.size == 1) as received:
        summary = trainer.train(run)
        if trainer.group.is_first:
            save_run_pictures(run, trainer.model, trainer.data.test)
    return summary, received


@contextmanager
def _stopping_on_signals(
    ask_to_stop: Callable[[], None], run: Path, watcher: Watcher, *, alone: bool = True
) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end what runs inside after the current step, its state saved; a second Ctrl-C ends it at once.

    One of several processes hears a signal twice, from the terminal and from torchrun. Torchrun ends the rest.

    Raises:
        Interrupted: as what runs inside raised it, with an exit code that says which signal it was.
    """
    from dgrad.training.trainer import Interrupted

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1 and alone:
            raise Interrupted(f"stopped at once; continue from the last checkpoint with: dgrad train --resume {run}")
        ask_to_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except Interrupted as interruption:
        if received:  # or it was another process that was asked to stop
            interruption.exit_code = 128 + received[0]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        watcher.close()


def _train_seeds(
    config: TrainConfig,
    count: int,
    out: Path | None,
    watcher: Watcher,
    group: ProcessGroup,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dgrad.training.seeds import Seeds

    _check_alone(group)
    watcher.label = _label(config.seed, count)
    path = out or _free_name(config)
    _run_seeds(Seeds.create(path, config, count, watcher, overwrite=overwrite), watcher, as_json=as_json)


def _resume_seeds(
    path: Path, settings: dict[str, Any], watcher: Watcher, group: ProcessGroup, *, as_json: bool
) -> None:
    from dgrad.pictures.of_a_run import draw_missing_pictures
    from dgrad.training.run_directory import Run
    from dgrad.training.seeds import Seeds, read_seeds, run_path, summarize

    _check_alone(group)
    seeds = read_seeds(path)
    runs = [Run(run_path(path, seed)) for seed in seeds]
    if all(run.summary() is not None for run in runs):
        for run in runs:
            draw_missing_pictures(run)
        _report_seeds(summarize(path), path, as_json=as_json)
        return
    watcher.label = _label(seeds[0], len(seeds))
    _run_seeds(Seeds.resume(path, watcher, **settings), watcher, as_json=as_json)


def _check_alone(group: ProcessGroup) -> None:
    if group.size > 1:
        raise InputError(f"seeds in parallel train in one process; got {group.size}: leave torchrun out")


def _label(first: int, count: int) -> str:
    """Which runs the progress is of.

    >>> _label(3, 1), _label(3, 4)
    ('seed 3', 'seeds 3 to 6, shown is 3')
    """
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}, shown is {first}"


def _run_seeds(seeds: Seeds, watcher: Watcher, *, as_json: bool) -> None:
    from dgrad.pictures.of_a_run import save_run_pictures

    with _stopping_on_signals(seeds.stop, seeds.path, watcher):
        summary = seeds.train()
        for trainer, run in seeds.runs.items():
            if str(trainer.config.seed) in summary["seeds"]:
                save_run_pictures(run, trainer.model, trainer.data.test)
    _report_seeds(summary, seeds.path, as_json=as_json)
    if problems := [f"seed {seed}: {problem}" for seed, problem in summary["problems"].items()]:
        raise RunError(f"{len(problems)} of {len(seeds.runs)} seeds failed: {'; '.join(problems)}")


def _report_seeds(summary: dict[str, Any], path: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"run": str(path), **summary})
        return
    from dgrad.training.run_directory import Run

    seeds = summary["seeds"]
    if not seeds:
        return
    for seed, one in seeds.items():
        warn_of_collapse(one["best"].get("code"), Run(path / f"seed{seed}").config)
    names = {"test bound": "test_bound", "reconstruction": "test_reconstruction", "KL": "test_kl"}
    any_ = next(iter(seeds.values()))
    if "test_accuracy" in any_["best"]:
        names["accuracy"] = "test_accuracy"
    rows = [
        [seed, *(_number(one["best"].get(name)) for name in names.values()), f"{one['best']['epoch']:g}"]
        for seed, one in seeds.items()
    ]
    print_table(["seed", *names, "weights of epoch"], rows)
    bound = summary["test_bound"]
    if bound is not None and bound["standard_deviation"] is not None:
        print(
            f"test bound  {bound['mean']:.2f} ± {bound['standard_deviation']:.2f} {any_['unit']}, mean and standard "
            f"deviation of {len(seeds)} seeds, {bound['least']:.2f} to {bound['greatest']:.2f}"
        )
    seconds = max(summary["seconds"] for summary in seeds.values())
    print(f"training    {any_['steps']} steps of each in {duration(seconds)} on {any_['device']}")
    first = next(iter(seeds))
    print(f"objective   KL {Run(path / f'seed{first}').config.kl}")
    print(f"runs        {path}: {', '.join(f'seed{seed}' for seed in seeds)}, summary.json")
    print(f"next        dgrad evaluate {path / f'seed{first}'} --importance-samples 1000")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) > 1 else f"{value:.4f}"


def _report(summary: dict[str, Any], path: Path, *, as_json: bool) -> None:
    from dgrad.training.run_directory import Run

    config = Run(path).config
    warn_of_collapse(summary["best"].get("code"), config)
    if as_json:
        print_json({"run": str(path), **summary})
        return
    from dgrad.pictures.of_a_run import RUN_PICTURES

    best, final, unit = summary["best"], summary["final"], summary["unit"]
    print(f"test bound  {figures(best, 'test', unit)}, weights of epoch {best['epoch']:g}, the best by validation")
    if "test_encoder_bound" in best:
        print(f"encoder     {best['test_encoder_bound']:.2f} {unit} with its own q, before it was refined")
    if best["step"] != final["step"]:
        print(f"at the end  {figures(final, 'test', unit)}, epoch {final['epoch']:g}")
    if "code" in best:  # runs of earlier versions have none
        print(f"code        {code_figures(best['code'])}")
    processes = f", {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
    print(f"training    {summary['steps']} steps in {duration(summary['seconds'])} on {summary['device']}{processes}")
    print(f"objective   KL {config.kl}")
    print(f"run         {path}: {', '.join(RUN_PICTURES)}, summary.json")
    print(f"next        dgrad evaluate {path} --importance-samples 1000")
    print(f"            dgrad export {path} --out model")
