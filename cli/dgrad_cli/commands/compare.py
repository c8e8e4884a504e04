"""`dgrad diagnose`, `compare`: estimators side by side. May import typer and rich; torch and the core only inside commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dgrad.config import TrainConfig, configure, option
from dgrad.errors import InputError, RunError
from dgrad_cli.commands.evaluate import Weights, load_split
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.commands.train import finish
from dgrad_cli.display import Watcher, duration, print_json, print_table
from dgrad_cli.options import (
    AdversarialRadiusOption,
    AdversarialWeightOption,
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
    EvalEveryOption,
    EvalRefineStepsOption,
    EvalSamplesOption,
    GaussianOption,
    HiddenOption,
    InputDropoutOption,
    KLWeightOption,
    LabelledBatchOption,
    LabelLossOption,
    LabelsOption,
    LabelWeightOption,
    LatentOption,
    LikelihoodOption,
    ModelOption,
    PluginOption,
    PretrainStepsOption,
    PropagateLabelsOption,
    RateOption,
    RefineStepsOption,
    StepsOption,
    SweepPrecisionOption,
    WeightDecayOption,
)
from dgrad_cli.writing import as_text, check_directory

if TYPE_CHECKING:
    from dgrad.data import Split
    from dgrad.experiments.comparison import Comparison
    from dgrad.experiments.diagnosis import Diagnosis, Row
    from dgrad.experiments.experiment import Experiment
    from dgrad.vae.model import DiscreteVAE

Estimators = Annotated[
    str, typer.Option(help="Names, separated by commas; `dgrad estimators` lists them.", metavar="NAME,NAME")
]
Values = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A hyper-parameter of one estimator, with one value or several, each taken: direct.epsilon=0.1,1; repeatable.",
        metavar="ESTIMATOR.NAME=VALUE,VALUE",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON; progress goes to the standard error.")]


def diagnose(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run directory of dgrad train; without one, a random start as train would begin.",
            metavar="RUN",
            show_default=False,
        ),
    ] = None,
    estimators: Estimators = "direct,gumbel-softmax,rloo",
    set_: Values = None,
    images: Annotated[int, typer.Option(help="Validation images, chosen by the seed.", min=1)] = 100,
    draws: Annotated[int, typer.Option(help="Of each estimator for each image.", min=2)] = 1000,
    warm_up: Annotated[
        int, typer.Option(help="Calls in which an estimator that learns or averages does so first.", min=0)
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Of the images, the noise, and the weights of a random start.", min=0, max=2**62)
    ] = 0,
    weights: Weights = "best",
    latent: LatentOption = None,
    dataset: DatasetOption = None,
    data_root: DataRootOption = None,
    binarize: BinarizeOption = None,
    model: ModelOption = None,
    hidden: HiddenOption = None,
    gaussian: GaussianOption = None,
    likelihood: LikelihoodOption = None,
    device: DeviceOption = None,
    plugin: PluginOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where diagnosis.json and diagnosis.png go. (default: the run's directory, or diagnosis)",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure bias, deviation and time of estimators' gradients at one model, against the exact gradient.

    The gradient is that of the reconstruction loss for the encoder's logits. Where the latent has too many codes to list, the
    mean of many draws of leg, which is unbiased, stands for the exact one.
    """
    from dgrad.experiments.diagnosis import choose_images
    from dgrad.experiments.diagnosis import diagnose as measure
    from dgrad.experiments.variants import read_variants
    from dgrad.files.atomic import write_text
    from dgrad.pictures.plots import save_diagnosis

    out = out or run or Path("diagnosis")
    check_directory(out)
    of_the_model = {
        "latent": latent,
        "binarize": binarize,
        "model": model,
        "hidden": hidden,
        "gaussian": gaussian,
        "likelihood": likelihood,
    }
    network: DiscreteVAE
    split: Split
    if run is not None:
        if given := [option(name) for name, value in of_the_model.items() if value is not None]:
            raise InputError(f"{run} has its own model and latent; leave out {', '.join(given)}, or leave out the run")
        load_plugins(plugin)
        network, state, split, config = load_split(run, "valid", dataset, data_root, weights, device or "auto")
        place = {"run": str(run), **state}
        where = f"at {run}, weights of epoch {state['epoch']:g} ({state['weights']})"
        variants = read_variants(estimators, set_ or ())  # after the run's own plugins
    else:
        from dgrad.experiments.diagnosis import random_start

        load_plugins(plugin)
        variants = read_variants(estimators, set_ or ())
        rest = {"dataset": dataset, "data-root": data_root, "device": device, "seed": seed, "plugin": plugin}
        config = configure(_given({**of_the_model, **rest}))
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
    failed = [row.label for row in diagnosis.rows if row.problem is not None and row.supported]
    if failed:
        raise RunError(f"{len(failed)} of {len(diagnosis.rows)} could not be measured: {', '.join(failed)}")


def _show_diagnosis(diagnosis: Diagnosis, where: str, out: Path) -> None:
    measured = [row for row in diagnosis.rows if row.problem is None]
    columns = [
        "estimator", "bias", "seen", "noise", "standard error", "deviation", "cosine of mean", "of one draw", "evaluations", "ms",
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


def compare(
    out: Annotated[
        Path,
        typer.Option(
            help="The runs' directory; the same command again goes on where it stopped.",
            metavar="DIR",
            show_default=False,
        ),
    ],
    estimators: Estimators = "direct,gumbel-softmax,rloo",
    set_: Values = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, with the seeds 0, 1, ...", min=1)] = 3,
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
    kl: Annotated[
        str | None,
        typer.Option(
            help="outside (exact, beside the estimate) or inside the objective, for all alike. (default: outside)",
            show_default=False,
        ),
    ] = None,
    kl_weight: KLWeightOption = None,
    labels: LabelsOption = None,
    labelled_batch: LabelledBatchOption = None,
    pretrain_steps: PretrainStepsOption = None,
    label_loss: LabelLossOption = None,
    label_weight: LabelWeightOption = None,
    balance_weight: BalanceWeightOption = None,
    adversarial_weight: AdversarialWeightOption = None,
    adversarial_radius: AdversarialRadiusOption = None,
    propagate_labels: PropagateLabelsOption = None,
    augment: AugmentOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    batch_size: BatchSizeOption = None,
    lr: RateOption = None,
    weight_decay: WeightDecayOption = None,
    device: DeviceOption = None,
    compile: CompileOption = None,
    sweep_precision: SweepPrecisionOption = None,
    eval_every: EvalEveryOption = None,
    eval_samples: EvalSamplesOption = None,
    refine_steps: RefineStepsOption = None,
    eval_refine_steps: EvalRefineStepsOption = None,
    plugin: PluginOption = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train several estimators in the same way, several seeds each, and put them side by side.

    Each is an ordinary run in DIR/ESTIMATOR-seed0 and so on. Ranks go by the validation bound; test images choose nothing.
    """
    from dgrad.experiments.comparison import plan, summarize, train_all
    from dgrad.experiments.variants import read_variants
    from dgrad.files.atomic import write_text
    from dgrad.pictures.of_a_run import draw_missing_of
    from dgrad.pictures.plots import save_comparison
    from dgrad.training.trainer import Interrupted

    if epochs is not None and steps is not None:
        raise InputError(f"--epochs {epochs} and --steps {steps} exclude each other; give one of them")
    load_plugins(plugin)
    variants = read_variants(estimators, set_ or ())
    given = {
        "latent": latent, "dataset": dataset, "data-root": data_root, "binarize": binarize, "model": model, "hidden": hidden, "gaussian": gaussian,
        "dropout": dropout, "input-dropout": input_dropout, "likelihood": likelihood, "kl": kl, "kl-weight": kl_weight, "labels": labels, "labelled-batch": labelled_batch, "pretrain-steps": pretrain_steps,
        "label-loss": label_loss, "label-weight": label_weight, "balance-weight": balance_weight, "adversarial-weight": adversarial_weight, "adversarial-radius": adversarial_radius, "propagate-labels": propagate_labels, "augment": augment, "epochs": epochs, "steps": steps,
        "batch-size": batch_size, "lr": lr, "weight-decay": weight_decay, "device": device, "compile": compile, "sweep-precision": sweep_precision, "eval-every": eval_every,
        "eval-samples": eval_samples, "refine-steps": refine_steps, "eval-refine-steps": eval_refine_steps, "plugin": plugin,
    }  # fmt: skip
    check_directory(out)
    entries = plan(configure(_given(given), TrainConfig()), variants, seeds, out)
    number = {entry.path: f"{index} of {len(entries)}" for index, entry in enumerate(entries, 1)}
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    for label, limitation in {e.label: e.limitation for e in entries if e.limitation is not None}.items():
        notes.print(f"{label} is left out: {limitation}", markup=False)
    if not quiet and (done := sum(entry.limitation is None and entry.finished for entry in entries)):
        notes.print(f"{done} of {len(entries)} runs in {out} are finished already", markup=False)

    def train(entry: Experiment) -> None:
        label = f"{number[entry.path]}, {entry.name}"
        watcher = Watcher(quiet=quiet, to_stderr=json, label=label)
        trainer, run = entry.open(watcher)
        _, received = finish(trainer, run, watcher)
        if received:
            interruption = Interrupted("stopped")
            interruption.exit_code = 128 + received[0]
            raise interruption

    try:
        problems = train_all(entries, train)
    except Interrupted as interruption:
        interruption.args = ("stopped, everything so far is kept; give the same command again to go on",)
        raise
    draw_missing_of(entries, lambda text: notes.print(text, markup=False))
    comparison = summarize(entries, problems)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "comparison.json", as_text(comparison.to_json()))
    if any(row.curve for row in comparison.rows):
        save_comparison(out / "comparison.png", comparison)
    if json:
        print_json(comparison.to_json())
    else:
        _show_comparison(comparison, out)
    if problems:
        raise RunError(f"{len(problems)} of {len(entries)} runs failed: {'; '.join(dict.fromkeys(problems.values()))}")


def _show_comparison(comparison: Comparison, out: Path) -> None:
    seconds = comparison.equal_seconds
    columns = ["rank", "estimator", "validation bound", "test bound", "evaluations", "seconds"]
    if seconds is not None:
        columns.append(f"validation after {seconds:.3g} s")
    if failed := any(row.problem for row in comparison.rows):
        columns.append("problem")
    rows = []
    for row in comparison.rows:
        cells = [
            "-" if row.rank is None else str(row.rank),
            row.label,
            _with_spread(row.valid_bound, row.valid_bound_spread),
            _with_spread(row.test_bound, row.test_bound_spread),
            "-" if row.evaluations is None else str(row.evaluations),
            "-" if row.seconds is None else f"{row.seconds:.3g}",
        ]
        if seconds is not None:
            cells.append(_with_spread(row.valid_bound_at_equal_time, None))
        rows.append([*cells, row.problem or ""] if failed else cells)
    print_table(columns, rows)
    config = comparison.config
    length = f"{config['steps']} steps" if config["steps"] is not None else f"{config['epochs']} epochs"
    spread = f"mean ± standard deviation of {comparison.seeds} seeds" if comparison.seeds > 1 else "1 seed"
    print(
        f"\nBounds in {comparison.unit or 'nats'}, the lower the better, {spread}; {length}, latent {config['latent']}, "
        f"{config['dataset']}, KL {config['kl']} for all; ranks by validation."
    )
    print(
        "evaluations: of the decoder, for one example in one step. seconds: with the evaluations on validation images."
    )
    if seconds is not None:
        print(
            f"validation after {duration(seconds) if seconds >= 1 else f'{seconds:.3g} s'}: the best bound by the time the fastest estimator was done."
        )
    pictures = ", comparison.png" if any(row.curve for row in comparison.rows) else ""
    print(f"{out}: comparison.json{pictures}, and a run directory for each seed")


def _with_spread(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says on the standard error what is measured: a live bar on a terminal, a line each elsewhere, nothing when quiet."""
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
