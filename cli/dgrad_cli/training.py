"""`dgrad train`. May import typer and rich; torch and the core's training only inside the command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.config import TrainConfig, configure, option, read_toml
from dgrad.errors import InputError
from dgrad_cli.display import Watcher, duration, figures, print_json

if TYPE_CHECKING:
    from dgrad.training import Trainer

DEFAULTS = TrainConfig()
PICTURES = ("reconstructions.png", "samples.png", "curves.png")


def setting(help_text: str, name: str, *names: str, kind: str | None = None) -> Any:
    """An option that is left out unless the user gives it, and whose help shows the default of `TrainConfig`."""
    default = getattr(DEFAULTS, name)
    annotation = str(TrainConfig.__dataclass_fields__[name].type)
    kind = kind or {"int": "INTEGER", "float": "NUMBER"}.get(annotation.removesuffix(" | None"), "TEXT")
    shown = "" if default in (None, {}, ()) else f" (default: {default})"
    return typer.Option(*(names or (option(name),)), help=help_text + shown, metavar=kind, show_default=False)


def train(
    estimator: Annotated[str | None, setting("Gradient estimator; `dgrad estimators` lists them.", "estimator")] = None,
    set_: Annotated[
        list[str] | None,
        setting(
            "A hyper-parameter of the estimator: epsilon=0.5, epsilon=geometric:1:0.02, samples=4; repeatable. `dgrad estimators` has the defaults: a constant epsilon or temperature, where the paper anneals from 1 (exponential:1:1e-5:1000:0.1), which with the KL trained lets the code collapse.",
            "set",
            kind="NAME=VALUE",
        ),
    ] = None,
    latent: Annotated[
        str | None, setting("Latent code: VARIABLESxVALUES; `dgrad latents` lists others.", "latent")
    ] = None,
    dataset: Annotated[
        str | None, setting("A name from `dgrad datasets`, a .npz file, or a folder of images by class.", "dataset")
    ] = None,
    data_root: Annotated[
        str | None,
        setting("Where data sets are on disk. (default: $DGRAD_DATA, else the user's cache folder)", "data_root"),
    ] = None,
    binarize: Annotated[
        str | None,
        setting(
            "threshold (round at 0.5), static (one draw), dynamic (a new draw each time), none (grey).", "binarize"
        ),
    ] = None,
    model: Annotated[str | None, setting("linear or mlp.", "model")] = None,
    hidden: Annotated[
        str | None, setting("Widths of hidden layers of mlp, from the image to the code: 400,200.", "hidden")
    ] = None,
    input_dropout: Annotated[
        str | None, setting("Share of pixels hidden from the encoder in a step.", "input_dropout")
    ] = None,
    likelihood: Annotated[str | None, setting("bernoulli, or squared-error (behind a tanh).", "likelihood")] = None,
    kl: Annotated[
        str | None,
        setting(
            "outside (exact, beside the estimate) or inside the objective. (default: inside for the direct family, else outside)",
            "kl",
        ),
    ] = None,
    kl_weight: Annotated[
        str | None, setting("Weight of the KL in training; at 0 it is reported, not trained.", "kl_weight")
    ] = None,
    epochs: Annotated[str | None, setting("Passes over the training images.", "epochs")] = None,
    steps: Annotated[str | None, setting("Number of steps, instead of epochs.", "steps")] = None,
    batch_size: Annotated[str | None, setting("Images in a step.", "batch_size")] = None,
    lr: Annotated[
        str | None,
        setting(
            "Adam's learning rate or a schedule of it; the paper's constant 0.001 learns more slowly.",
            "lr",
            kind="RATE",
        ),
    ] = None,
    weight_decay: Annotated[str | None, setting("Decoupled weight decay, not on biases.", "weight_decay")] = None,
    seed: Annotated[
        str | None, setting("Of the weights, the order of the data, the noise, the evaluation.", "seed")
    ] = None,
    device: Annotated[str | None, setting("auto, cpu, cuda, cuda:1, mps.", "device")] = None,
    eval_every: Annotated[
        str | None, setting("Epochs between evaluations on the validation images.", "eval_every")
    ] = None,
    eval_samples: Annotated[
        str | None, setting("Codes for each test image in the final evaluation.", "eval_samples")
    ] = None,
    plugin: Annotated[
        list[str] | None, setting("A plugin to load: a module or a .py file; repeatable.", "plugins", kind="PLUGIN")
    ] = None,
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
        "estimator": estimator, "set": None if set_ is None else dict(map(_pair, set_)), "latent": latent, "dataset": dataset,
        "data-root": data_root, "binarize": binarize, "model": model, "hidden": hidden, "input-dropout": input_dropout,
        "likelihood": likelihood, "kl": kl, "kl-weight": kl_weight, "epochs": epochs, "steps": steps, "batch-size": batch_size, "lr": lr,
        "weight-decay": weight_decay, "seed": seed, "device": device, "eval-every": eval_every, "eval-samples": eval_samples,
        "plugin": plugin,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    watcher = Watcher(quiet=quiet, to_stderr=json)
    if resume is not None:
        _resume(
            resume,
            settings,
            watcher,
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
    _train(configure(settings, base), out, watcher, overwrite=overwrite, as_json=json)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise InputError(f"--set expects NAME=VALUE, for example epsilon=0.5; got {text!r}")
    return name.strip().replace("-", "_"), value.strip()


def _train(config: TrainConfig, out: Path | None, watcher: Watcher, *, overwrite: bool, as_json: bool) -> None:
    from dgrad.runs import Run
    from dgrad.training import Trainer

    path = out or _free_name(config)
    Run.check_free(path, overwrite=overwrite)
    trainer = Trainer(config, watcher)
    run = Run.create(path, trainer.config, overwrite=overwrite, first_save=trainer.save)
    _run(trainer, run, watcher, as_json=as_json)


def _resume(
    path: Path, settings: dict[str, Any], watcher: Watcher, *, conflicting: dict[str, Any], as_json: bool
) -> None:
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
    if summary is not None and all((path / picture).is_file() for picture in PICTURES):
        _report(summary, path, as_json=as_json)
        return
    trainer, run = resume(path, watcher, **settings)
    _run(trainer, run, watcher, as_json=as_json)


def _free_name(config: TrainConfig) -> Path:
    """`runs/digits-20x10-direct`, with a number behind it where that is taken."""
    name = f"{Path(config.dataset).stem}-{config.latent}-{config.estimator}".replace(":", "-").replace("/", "-")
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _run(trainer: Trainer, run: Any, watcher: Watcher, *, as_json: bool) -> None:
    from dgrad.pictures import save_run_pictures
    from dgrad.training import Interrupted

    try:
        with _stopping_on_signals(trainer, run.path) as received:
            summary = trainer.train(run)
            save_run_pictures(trainer, run.path, run.metrics())
    except Interrupted as interruption:
        interruption.exit_code = 128 + received[0]
        raise
    finally:
        watcher.close()
    _report(summary, run.path, as_json=as_json)


@contextmanager
def _stopping_on_signals(trainer: Trainer, run: Path) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the current step, its state saved; a second Ctrl-C ends it at once."""
    from dgrad.training import Interrupted

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
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
    best, final, unit = summary["best"], summary["final"], summary["unit"]
    print(f"test bound  {figures(best, 'test', unit)}, weights of epoch {best['epoch']:g}, the best by validation")
    if best["step"] != final["step"]:
        print(f"at the end  {figures(final, 'test', unit)}, epoch {final['epoch']:g}")
    print(f"training    {summary['steps']} steps in {duration(summary['seconds'])} on {summary['device']}")
    print(f"run         {path}: {', '.join(PICTURES)}, summary.json")
    print(f"next        dgrad evaluate {path} --importance-samples 1000")
    print(f"            dgrad export {path} --out model")
