"""`dgrad evaluate`, `sample`, `reconstruct`: the figures and the pictures of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.config import about
from dgrad.errors import InputError
from dgrad.files.atomic import check_place
from dgrad_cli.display import code_figures, figures, print_json, warn_of_collapse
from dgrad_cli.options import FIELDS, Json

if TYPE_CHECKING:
    from dgrad.config import TrainConfig
    from dgrad.data import Split
    from dgrad.vae.model import DiscreteVAE

RunArgument = Annotated[Path, typer.Argument(help="A run directory of dgrad train.", metavar="RUN")]
Weights = Annotated[str, typer.Option(help="best (by validation) or last.", metavar="NAME")]
Device = Annotated[str, typer.Option(help=about(FIELDS["device"]).help, metavar="NAME")]
Seed = Annotated[int, typer.Option(help="Of the codes drawn.", metavar="N", min=0, max=2**62)]
SplitName = Annotated[str, typer.Option(help="train, valid or test.", metavar="NAME")]
Picture = Annotated[Path, typer.Option(help="The PNG to write.", metavar="FILE.png")]
Rows = Annotated[int, typer.Option(metavar="N", min=1)]
Columns = Annotated[int | None, typer.Option(help="(default: 12)", metavar="N", min=1)]
DatasetName = Annotated[
    str | None, typer.Option(help="Another data set with images of the same size. (default: the run's)", metavar="NAME")
]
DataRoot = Annotated[str | None, typer.Option(help="Where data sets are on disk. (default: the run's)", metavar="DIR")]


def evaluate(
    run: RunArgument,
    split: SplitName = "test",
    eval_samples: Annotated[
        int, typer.Option(help="Codes for each image; small supports are summed exactly.", metavar="N", min=1)
    ] = 10,
    importance_samples: Annotated[
        int | None,
        typer.Option(help="Also the importance-weighted bound on -log p(x), with so many codes.", metavar="N", min=1),
    ] = None,
    refine_steps: Annotated[
        int | None, typer.Option(help="Sweeps that refine q of each image. (default: the run's)", metavar="N", min=0)
    ] = None,
    seed: Seed = 0,
    dataset: DatasetName = None,
    data_root: DataRoot = None,
    weights: Weights = "best",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure the bound of a trained model."""
    from dgrad.vae import evaluation
    from dgrad.vae.usage import code_usage

    model, state, images, config = load_split(run, split, dataset, data_root, weights, device)
    target = images.images.device
    steps = config.steps_to_evaluate if refine_steps is None else refine_steps
    model.compiled_kernels = steps > 0 and config.compile != "off"  # sweeps are what takes the time

    def measure(measured: Callable[..., Any], samples: int, steps: int) -> Any:
        generator = evaluation.evaluation_generator(target, seed)
        return measured(model, images, samples=samples, generator=generator, refine_steps=steps)

    bound = measure(evaluation.evaluate_bound, eval_samples, steps)
    result: dict[str, Any] = {
        "run": str(run), "dataset": config.dataset, "split": split, "images": len(images), **state,
        "bound": bound.bound, "reconstruction": bound.reconstruction, "kl": bound.kl,
        "standard_error": None if bound.standard_error != bound.standard_error else bound.standard_error,
        "unit": model.likelihood.unit,
    }  # fmt: skip
    if config.labels and images.labels is not None:
        result |= evaluation.evaluate_accuracies(model, images, config.attributes)
    if config.binarize == "none":
        result |= evaluation.grey_figures(model, images, bound.bound)
    if bound.gaussian_kl is not None:
        result["gaussian_kl"] = bound.gaussian_kl
    if steps:
        result |= {"refine_steps": steps, "encoder_bound": measure(evaluation.evaluate_bound, eval_samples, 0).bound}
    result["code"] = code_usage(model, images, generator=evaluation.evaluation_generator(target, seed)).to_json()
    if importance_samples is not None:
        result["importance_samples"] = importance_samples
        weighted = measure(evaluation.importance_weighted_bound, importance_samples, steps)
        result["importance_weighted_bound"] = weighted
    warn_of_collapse(result["code"], config)
    if json:
        print_json(result)
        return
    values = {f"test_{name}": value for name, value in result.items()}
    print(
        f"{split} bound  {figures(values, 'test', result['unit'])}, {len(images)} images, "
        f"weights of epoch {state['epoch']:g} ({state['weights']})"
    )
    if steps:
        print(
            f"encoder     {result['encoder_bound']:.2f} {result['unit']} with its own q; above, q was refined in "
            f"{steps} steps for each image"
        )
    print(f"code        {code_figures(result['code'])}")
    if importance_samples is not None:
        print(
            f"-log p(x)   at most {result['importance_weighted_bound']:.2f} {result['unit']} "
            f"({importance_samples} importance samples)"
        )


def sample(
    run: RunArgument,
    out: Picture = Path("samples.png"),
    rows: Rows = 8,
    columns: Columns = None,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="A column for each value of the first variable (each class), or each attribute off and on; "
            "a row for each style.",
        ),
    ] = False,
    seed: Seed = 0,
    weights: Weights = "best",
) -> None:
    """Draw codes from the uniform prior and write what they decode to."""
    from torch import Generator

    from dgrad.pictures.image_grids import save_attribute_grid, save_class_grid, save_samples
    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    _check_picture(out)
    if grid and columns is not None:
        raise InputError(f"--grid has a column for each value of a variable; got --columns {columns}: leave it out")
    check_choice("--weights", weights, ("best", "last"))
    opened = Run.open(run)
    model, state = load_model(opened, weights)
    attributes = opened.config.attributes
    note_unfinished(run, state)
    generator = Generator().manual_seed(seed)
    if grid and attributes:
        save_attribute_grid(out, model, attributes, generator=generator, rows=rows)
    elif grid:
        save_class_grid(out, model, generator=generator, rows=rows)
    else:
        save_samples(out, model, generator=generator, rows=rows, columns=columns or 12)
    print(out)


def reconstruct(
    run: RunArgument,
    out: Picture = Path("reconstructions.png"),
    split: SplitName = "test",
    rows: Rows = 4,
    columns: Columns = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Instead, a row for each image, with each attribute switched off and on.")
    ] = False,
    dataset: DatasetName = None,
    data_root: DataRoot = None,
    weights: Weights = "best",
) -> None:
    """Write images and, below each, what its most probable code decodes to."""
    from dgrad.pictures.image_grids import save_reconstructions, save_toggled

    _check_picture(out)
    if grid and columns is not None:
        raise InputError(f"--grid has two columns for each attribute; got --columns {columns}: leave it out")
    model, _, images, config = load_split(run, split, dataset, data_root, weights, "cpu")
    if grid and not config.attributes:
        raise InputError(
            f"--grid switches attributes, and {run} has learned none; expected a run with --attributes: "
            "leave --grid out"
        )
    if grid:
        save_toggled(out, model, images, config.attributes, rows=rows)
    else:
        save_reconstructions(out, model, images, rows=rows, columns=columns or 12)
    print(out)


def load_split(
    path: Path, split: str, dataset: str | None, data_root: str | None, weights: str, device: str
) -> tuple[DiscreteVAE, dict[str, Any], Split, TrainConfig]:
    """The run's model, where its weights are from, a split binarised as in the run, and the configuration."""
    from dataclasses import replace

    from dgrad.devices import choose_device
    from dgrad.training.build import Build
    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    check_choice("--split", split, ("train", "valid", "test"))
    check_choice("--weights", weights, ("best", "last"))
    target = choose_device(device)
    run = Run.open(path)
    config = run.config
    model, state = load_model(run, weights)
    note_unfinished(path, state)
    config = replace(config, dataset=dataset or config.dataset, data_root=data_root or config.data_root)
    build = Build(config)
    if build.dataset.image_shape != model.image_shape:
        raise InputError(
            f"{config.dataset} has images of shape {list(build.dataset.image_shape)} (channels, height, width); the "
            f"model of {path} takes "
            f"{list(model.image_shape)}: choose a data set of that size"
        )
    chosen: Split = getattr(build.evaluation_data, split)
    return model.to(target), state, chosen.to(target), config


def note_unfinished(path: Path, state: dict[str, Any]) -> None:
    """Say on the standard error where a run is not finished."""
    from dgrad.training.run_directory import Run

    if Run.open(path).summary() is None:
        print(f"note: {path} is not finished; these are its weights of step {state['step']}", file=sys.stderr)


def check_choice(name: str, got: str, choices: tuple[str, ...]) -> None:
    """Make sure that the value of an option is one of its choices."""
    if got not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {got!r}")


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"--out must end with .png; got {path}")
    check_place("--out", path, "picture")
