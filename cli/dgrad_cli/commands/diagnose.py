"""`dgrad diagnose`: gradients of estimators at one model. Torch and the core are imported inside the command alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dgrad.config import configure, option
from dgrad.errors import InputError, RunError
from dgrad_cli.commands.evaluate import Weights, load_split
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.display import print_json, print_table
from dgrad_cli.options import Estimators, Json, Quiet, check_single, takes_settings
from dgrad_cli.writing import as_text, check_directory

if TYPE_CHECKING:
    from dgrad.experiments.diagnosis import Diagnosis, Row

OF_THE_MODEL = ("latent", "binarize", "model", "hidden", "gaussian", "likelihood")
"""Settings that a run has of its own."""


@takes_settings(
    *("set", "latent", "dataset", "data_root", "binarize", "model", "hidden", "gaussian", "likelihood", "device"),
    "plugins",
    several=("set",),
)
def diagnose(
    run: Annotated[
        Path | None, typer.Argument(help="A run of dgrad train; without one, a random start.", metavar="RUN")
    ] = None,
    *,
    estimators: Estimators = "direct,gumbel-softmax,rloo",
    images: Annotated[int, typer.Option(help="Validation images, chosen by the seed.", metavar="N", min=1)] = 100,
    draws: Annotated[int, typer.Option(help="Of each estimator for each image.", metavar="N", min=2)] = 1000,
    warm_up: Annotated[
        int, typer.Option(help="Calls in which an estimator that learns or averages does so first.", metavar="N", min=0)
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Of the images, the noise and a random start's weights.", metavar="N", min=0, max=2**62)
    ] = 0,
    weights: Weights = "best",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where diagnosis.json and diagnosis.png go. (default: the run's directory, or diagnosis)",
            metavar="DIR",
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Measure bias, deviation and time of estimators' gradients at one model, against the exact gradient.

    The gradient is that of the reconstruction loss for the encoder's logits. Where the latent has too many codes to
    list, the mean of many draws of leg, which is unbiased, stands for the exact one.
    """
    from dgrad.experiments.diagnosis import choose_images, random_start
    from dgrad.experiments.diagnosis import diagnose as measure
    from dgrad.experiments.variants import read_variants
    from dgrad.files.atomic import write_text
    from dgrad.pictures.plots import save_diagnosis

    out = out or run or Path("diagnosis")
    check_directory(out)
    check_single("diagnose", given, ["latent"], "give the command once for each")
    settings = {name: value for name, value in given.items() if name != "set"}
    values = given.get("set", ())
    if run is not None:
        if own := [option(name) for name in settings if name in OF_THE_MODEL]:
            raise InputError(f"{run} has its own model and latent; leave out {', '.join(own)}, or leave out the run")
        load_plugins(settings.get("plugins"))
        data = (settings.get("dataset"), settings.get("data_root"))
        network, state, split, config = load_split(run, "valid", *data, weights, settings.get("device", "auto"))
        place = {"run": str(run), **state}
        where = f"at {run}, weights of epoch {state['epoch']:g} ({state['weights']})"
        variants = read_variants(estimators, values)  # after the run's own plugins
    else:
        load_plugins(settings.get("plugins"))
        variants = read_variants(estimators, values)
        config = configure({**settings, "seed": seed})
        network, split = random_start(config)
        place = {"run": None}
        where = f"at a random start (seed {seed})"
    with _progress(len(variants) + 1, quiet=quiet) as progress:
        chosen = choose_images(split, images, seed)
        diagnosis = measure(network, chosen, variants, draws=draws, seed=seed, warm_up=warm_up, progress=progress)
    result = {**place, "dataset": config.dataset, "split": "valid", "model": config.model, **diagnosis.to_json()}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "diagnosis.json", as_text(result))
    if any(row.problem is None for row in diagnosis.rows):
        save_diagnosis(out / "diagnosis.png", diagnosis)
    if json:
        print_json(result)
    else:
        _show_diagnosis(diagnosis, f"{where}; {diagnosis.images} validation images of {config.dataset}", out)
    if failed := [row.label for row in diagnosis.rows if row.problem is not None and row.supported]:
        raise RunError(f"{len(failed)} of {len(diagnosis.rows)} could not be measured: {', '.join(failed)}")


def _show_diagnosis(diagnosis: Diagnosis, where: str, out: Path) -> None:
    measured = [row for row in diagnosis.rows if row.problem is None]
    columns = [
        "estimator", "bias", "seen", "noise", "standard error", "deviation", "cosine of mean", "of one draw",
        "evaluations", "ms",
    ]  # fmt: skip
    if measured:
        print_table(columns, (_cells(row, diagnosis.gradient) for row in measured))
    for row in diagnosis.rows:
        if row.problem is not None:
            print(f"{row.label}: not measured: {row.problem}")
    unit = f"{diagnosis.unit} per unit of a logit"
    print(f"\nGradient of the reconstruction loss (no KL) for the logits of {diagnosis.latent}, {unit}, {where}.")
    size = f"mean |gradient| {_short(diagnosis.gradient)}"
    if diagnosis.reference == "exact":
        print(f"Against the exact gradient, by enumeration: {size}. {diagnosis.draws} draws of each estimator.")
    else:
        print(
            f"Against the mean of {diagnosis.reference_draws} draws of {diagnosis.reference}, unbiased, standard error "
            f"{_short(diagnosis.reference_standard_error)}: {size}. {diagnosis.draws} draws of each estimator."
        )
    print(
        "bias: mean |E[g] - gradient| over coordinates, from what is seen with the noise of that many draws taken out; "
        "< where it cannot be told from none."
    )
    print(
        "ms: one draw for all the images, with its gradient, the median. evaluations: of the decoder, for each image."
    )
    if learned := {row.estimator: row.warm_up for row in measured if row.warm_up}:
        print(f"After {max(learned.values())} calls to learn in: {', '.join(learned)}.")
    print(f"{out}: diagnosis.json{', diagnosis.png' if measured else ''}")


def _cells(row: Row, gradient: float) -> list[str]:
    at_most = row.bias_at_most or 0.0
    bias = f"< {_short(at_most)}" if at_most > 1e-5 * gradient else "none"  # less than that is rounding
    return [
        row.label,
        bias if row.within_noise else _short(row.bias_corrected),
        _short(row.bias),
        _short(row.noise_floor),
        _short(row.bias_standard_error),
        _short(row.deviation),
        f"{row.cosine_of_mean:.3f}",
        f"{row.cosine_of_draw:.3f}",
        str(row.evaluations),
        f"{1000 * (row.seconds or 0):.3g}",
    ]


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say on the standard error what is measured.

    On a terminal that is a live bar, elsewhere a line each, and nothing when quiet.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda label: None
        return
    if not console.is_terminal:
        yield lambda label: console.print(f"measuring {label}", markup=False, soft_wrap=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("measuring {task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        measured = -1

        def move(label: str) -> None:
            nonlocal measured
            measured += 1
            bar.update(task, description=label, completed=measured)

        yield move
