"""`dgrad train`. May import typer and rich; torch and the core's training only inside the command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.config import TrainConfig, configure, read_toml
from dgrad.distributed import World
from dgrad.errors import InputError
from dgrad_cli.display import Watcher, duration, figures, print_json
from dgrad_cli.settings import (
    AugmentOption,
    BalanceWeightOption,
    BatchSizeOption,
    BinarizeOption,
    CompileOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    DropoutOption,
    EpochsOption,
    EstimatorOption,
    EvalEveryOption,
    EvalSamplesOption,
    GaussianOption,
    HiddenOption,
    InputDropoutOption,
    KLOption,
    KLWeightOption,
    LabelledBatchOption,
    LabelLossOption,
    LabelsOption,
    LabelWeightOption,
    LatentOption,
    LikelihoodOption,
    ModelOption,
    PluginOption,
    RateOption,
    SeedOption,
    SetOption,
    StepsOption,
    WeightDecayOption,
)

if TYPE_CHECKING:
    from dgrad.runs import Run
    from dgrad.training import Trainer


def train(
    estimator: EstimatorOption = None,
    set_: SetOption = None,
    latent: LatentOption = None,
    dataset: DatasetOption = None,
    data_root: DataRootOption = None,
    binarize: BinarizeOption = None,
    model: ModelOption = None,
    hidden: HiddenOption = None,
    gaussian: GaussianOption = None,
    dropout: DropoutOption = None,
    input_dropout: InputDropoutOption = None,
    likelihood: LikelihoodOption = None,
    kl: KLOption = None,
    kl_weight: KLWeightOption = None,
    labels: LabelsOption = None,
    labelled_batch: LabelledBatchOption = None,
    label_loss: LabelLossOption = None,
    label_weight: LabelWeightOption = None,
    balance_weight: BalanceWeightOption = None,
    augment: AugmentOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    batch_size: BatchSizeOption = None,
    lr: RateOption = None,
    weight_decay: WeightDecayOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    compile: CompileOption = None,
    eval_every: EvalEveryOption = None,
    eval_samples: EvalSamplesOption = None,
    plugin: PluginOption = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file of settings; options go before it.", metavar="FILE.toml", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's directory (default: runs/DATASET-LATENT-ESTIMATOR, with a number where that is taken).",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this run from its last checkpoint.", metavar="RUN", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run at --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON; progress goes to the standard error.")
    ] = False,
) -> None:
    """Train a discrete variational auto-encoder, evaluate it on test images, and keep everything in a run directory."""
    given: dict[str, Any] = {
        "estimator": estimator, "set": None if set_ is None else dict(map(name_and_value, set_)), "latent": latent, "dataset": dataset,
        "data-root": data_root, "binarize": binarize, "model": model, "hidden": hidden, "gaussian": gaussian, "dropout": dropout, "input-dropout": input_dropout,
        "likelihood": likelihood, "kl": kl, "kl-weight": kl_weight, "labels": labels, "labelled-batch": labelled_batch,
        "label-loss": label_loss, "label-weight": label_weight, "balance-weight": balance_weight, "augment": augment, "epochs": epochs, "steps": steps, "batch-size": batch_size, "lr": lr,
        "weight-decay": weight_decay, "seed": seed, "device": device, "compile": compile, "eval-every": eval_every, "eval-samples": eval_samples,
        "plugin": plugin,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    world = World.from_environment()
    watcher = Watcher(quiet=quiet, to_stderr=json)
    if resume is not None:
        _resume(
            resume,
            settings,
            watcher,
            world,
            conflicting={"--config": config, "--out": out, "--overwrite": overwrite},
            as_json=json,
        )
        return
    if epochs is not None and steps is not None:
        raise InputError(f"--epochs {epochs} and --steps {steps} exclude each other; give one of them")
    base = configure(read_toml(config)) if config is not None else TrainConfig()
    if epochs is not None:
        settings["steps"] = None
    if "set" in settings and settings.get("estimator", base.estimator) == base.estimator:
        settings["set"] = {**base.set, **settings["set"]}
    elif "estimator" in settings and settings["estimator"] != base.estimator:
        settings.setdefault("set", {})  # another estimator's hyper-parameters mean nothing to this one
    _train(configure(settings, base), out, watcher, world, overwrite=overwrite, as_json=json)


def name_and_value(text: str) -> tuple[str, str]:
    """The two sides of `NAME=VALUE`.

    Raises:
        InputError: it is not of that form.
    """
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise InputError(f"--set expects NAME=VALUE, for example epsilon=0.5; got {text!r}")
    return name.strip().replace("-", "_"), value.strip()


def _train(
    config: TrainConfig, out: Path | None, watcher: Watcher, world: World, *, overwrite: bool, as_json: bool
) -> None:
    from dgrad.runs import Run
    from dgrad.training import Trainer

    def choose() -> Path:
        path = out or _free_name(config)
        Run.check_free(path, overwrite=overwrite)
        return path

    with world.joined(config.device):
        path = world.from_first(choose)
        trainer = Trainer(config, watcher, world)
        if world.is_first:
            run = Run.create(path, trainer.config, overwrite=overwrite, first_save=trainer.save)
        else:
            run = Run(path)
            trainer.save(run)  # its part of it
        _run(trainer, run, watcher, as_json=as_json)


def _resume(
    path: Path,
    settings: dict[str, Any],
    watcher: Watcher,
    world: World,
    *,
    conflicting: dict[str, Any],
    as_json: bool,
) -> None:
    from dgrad.pictures import RUN_PICTURES
    from dgrad.runs import Run
    from dgrad.training import resume

    refused = [f"--{name}" for name in settings if name != "device"] + [
        name for name, value in conflicting.items() if value
    ]
    if refused:
        raise InputError(
            f"--resume continues a run as it was configured; leave out {', '.join(refused)}, or start a new run"
        )
    run = Run.open(path)
    summary = run.summary()
    if summary is not None and all((path / picture).is_file() for picture in RUN_PICTURES):
        if world.is_first:
            _report(summary, path, as_json=as_json)
        return
    with world.joined(settings.get("device", run.config.device)):
        trainer, run = resume(path, watcher, world, **settings)
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
    if trainer.world.is_first:
        _report(summary, run.path, as_json=as_json)


def finish(trainer: Trainer, run: Run, watcher: Watcher) -> tuple[dict[str, Any], list[int]]:
    """Train to the end, with pictures; the summary, and the signals that came too late to stop it.

    Raises:
        Interrupted: a signal asked to stop; its exit code says which.
    """
    from dgrad.pictures import save_run_pictures
    from dgrad.training import Interrupted

    try:
        with _stopping_on_signals(trainer, run.path) as received:
            summary = trainer.train(run)
            if trainer.world.is_first:
                save_run_pictures(trainer, run.path, run.metrics())
    except Interrupted as interruption:
        if received:  # or it was another process that was asked to stop
            interruption.exit_code = 128 + received[0]
        raise
    finally:
        watcher.close()
    return summary, received


@contextmanager
def _stopping_on_signals(trainer: Trainer, run: Path) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the current step, its state saved; a second Ctrl-C ends it at once.

    One of several processes hears a signal more than once, from the terminal and from torchrun, which itself ends what does not stop.
    """
    from dgrad.training import Interrupted

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1 and trainer.world.size == 1:
            raise Interrupted(f"stopped at once; continue from the last checkpoint with: dgrad train --resume {run}")
        trainer.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(summary: dict[str, Any], path: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"run": str(path), **summary})
        return
    from dgrad.pictures import RUN_PICTURES

    best, final, unit = summary["best"], summary["final"], summary["unit"]
    print(f"test bound  {figures(best, 'test', unit)}, weights of epoch {best['epoch']:g}, the best by validation")
    if best["step"] != final["step"]:
        print(f"at the end  {figures(final, 'test', unit)}, epoch {final['epoch']:g}")
    processes = f", {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
    print(f"training    {summary['steps']} steps in {duration(summary['seconds'])} on {summary['device']}{processes}")
    print(f"run         {path}: {', '.join(RUN_PICTURES)}, summary.json")
    print(f"next        dgrad evaluate {path} --importance-samples 1000")
    print(f"            dgrad export {path} --out model")
