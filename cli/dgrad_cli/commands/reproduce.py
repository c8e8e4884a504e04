"""`dgrad reproduce`: the paper's experiments, each a recipe in the folder `recipes`.

A recipe is a TOML file:
- `title`, `needs` (a data set) and `takes` (how long).
- `[sweep]`, which `dgrad.experiments.grid.expand` reads.
- `figure`, the figure that is set beside the paper's, and `[paper]`, the paper's figures by the label of a combination.
- `[plot]`, whose `kind` is a function of `PLOTS`, and whose `quick` replaces some of it with `--quick`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.errors import unknown_name
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.commands.sweep import check_failures, figure_text, run_recipe, show_results
from dgrad_cli.display import print_json, print_table
from dgrad_cli.options import FIELDS, Devices, DryRun, Jobs, Json, Quiet, Seeds, read_overrides, takes_settings
from dgrad_cli.writing import as_text, check_directory

if TYPE_CHECKING:
    from dgrad.experiments.experiment import Experiment
    from dgrad.experiments.results import Results

FOLDER = Path(__file__).parents[1] / "recipes"
QUICK: dict[str, Any] = {"epochs": 1, "seed": [0], "eval_samples": 1}
"""What `--quick` puts on top of a recipe."""
FIGURES = {
    "test_bound": "test bound",
    "test_reconstruction": "test reconstruction",
    "valid_bound": "validation bound",
    "accuracy": "test accuracy",
}


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper; what the fields are, the module says."""

    name: str
    title: str
    needs: str
    takes: str
    figure: str
    sweep: dict[str, Any]
    plot: dict[str, Any]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a file."""
        return cls(path.stem, **tomllib.loads(path.read_text(encoding="utf-8")))


def recipes() -> dict[str, Recipe]:
    """All recipes that ship with the package, by name."""
    return {path.stem: Recipe.read(path) for path in sorted(FOLDER.glob("*.toml"), key=lambda path: path.stem)}


@takes_settings(several=FIELDS, shown=dict.fromkeys(FIELDS, ""))
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which one; without it they are listed.")] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where everything goes; the same command again does what is missing. (default: runs/NAME)",
            metavar="DIR",
        ),
    ] = None,
    seeds: Seeds = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch and one seed: whether it works, not what comes out.")
    ] = False,
    jobs: Jobs = None,
    device: Devices = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Repeat an experiment of the paper: its table beside ours, its plot or picture, and all figures as JSON.

    Settings go before the recipe's, one value or several, separated by commas.
    """
    known = recipes()
    if name is None:
        _list(known, as_json=json)
        return
    if name not in known:
        raise unknown_name("experiment", name, known, "`dgrad reproduce` lists them.")
    recipe, out = known[name], out or Path("runs") / name
    if given.keys() & {"dataset", "binarize", "likelihood"}:
        recipe = replace(recipe, paper={})  # its figures are of other images
    if quick:
        recipe = replace(recipe, plot=recipe.plot | recipe.plot.get("quick", {}))
    check_directory(out)
    load_plugins(given.get("plugins"))
    overrides = read_overrides(given, seeds)
    if quick:
        of_quick = {key: value for key, value in QUICK.items() if key != "epochs" or "steps" not in overrides}
        overrides = of_quick | overrides
    experiments, results = run_recipe(recipe.sweep, out, overrides, jobs, device, dry_run=dry_run, quiet=quiet)
    if not dry_run:
        _write(recipe, experiments, results, out)
    if json:
        print_json({"name": name, "paper": recipe.paper, **results.to_json()})
    else:
        show_results(results, out, dry_run=dry_run)
    if not (dry_run or json):
        print(f"{recipe.title}: {', '.join(sorted(path.name for path in out.glob(f'{name}*')))} in {out}")
    check_failures(results)


def _list(known: Mapping[str, Recipe], *, as_json: bool) -> None:
    rows = [
        {name: getattr(known_recipe, name) for name in ("name", "title", "needs", "takes")}
        for known_recipe in known.values()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(["name", "experiment", "needs", "takes"], (list(row.values()) for row in rows))
    print(
        "\ndgrad reproduce NAME --data-root DIR; --quick tries it in minutes. "
        "Lorberbom, Gane, Jaakkola, Hazan, NeurIPS 2019."
    )


def _write(recipe: Recipe, experiments: list[Experiment], results: Results, out: Path) -> None:
    """The table, the JSON, which has the evaluations of every run too, and the picture."""
    from dgrad.files.atomic import write_text
    from dgrad.training.run_directory import Run

    write_text(out / f"{recipe.name}.md", table(recipe, results))
    measured = results.to_json()
    for row, experiment in zip(measured["runs"], experiments, strict=True):
        row["metrics"] = Run(experiment.path).metrics()
    facts = {"name": recipe.name, "title": recipe.title, "paper": recipe.paper, **measured}
    write_text(out / f"{recipe.name}.json", as_text(facts))
    finished = {row["run"] for row in results.runs if row["state"] == "finished"}
    PLOTS[recipe.plot["kind"]](
        recipe, [experiment for experiment in experiments if experiment.path.name in finished], results, out
    )


def table(recipe: Recipe, results: Results) -> str:
    """Ours beside the paper's, as Markdown."""
    columns = list(dict.fromkeys(column for figures in recipe.paper.values() for column in figures))
    lines = [
        [
            "",
            "seeds",
            f"{FIGURES[recipe.figure]}, ours",
            "each seed",
            *(f"paper, {column}" for column in columns),
        ],
        ["---"] * (4 + len(columns)),
    ]
    for one in results.combinations:
        theirs = recipe.paper.get(one.label, {})
        values = one.figures.get(recipe.figure, {}).get("values", [])
        line = [one.label, f"{one.finished} of {one.seeds}" if one.finished < one.seeds else str(one.seeds)]
        line += [figure_text(one, recipe.figure), ", ".join(_shown(recipe, value) for value in values)]
        lines.append(line + [_shown(recipe, theirs[column]) if column in theirs else "" for column in columns])
    return f"# {recipe.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(recipe: Recipe, value: float) -> str:
    return f"{100 * value:.2f} %" if recipe.figure == "accuracy" else f"{value:.2f}"


# Plots: each writes `out/NAME*.png`


def _curves(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.pictures.plots import save_bound_curves
    from dgrad.training.run_directory import Run

    panels: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for experiment in finished:
        panel = str(getattr(experiment.config, recipe.plot["panel"]))
        panels.setdefault(panel, {}).setdefault(experiment.label, []).append(Run(experiment.path).metrics())
    if panels:
        unit = next(one.unit for one in results.combinations if one.unit)
        save_bound_curves(out / f"{recipe.name}.png", panels, unit)


def _points(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.pictures.plots import save_points

    axis = recipe.plot["x"]
    series: dict[str, dict[str, tuple[float, float]]] = {}
    paper: dict[str, dict[str, float]] = {}
    for one in results.combinations:
        x = str(one.config[axis])
        if recipe.figure in one.figures:
            figure = one.figures[recipe.figure]
            name = one.label.replace(f"{axis}={x}", "").replace(x, "").strip()
            series.setdefault(name, {})[x] = (figure["mean"], figure["standard_deviation"] or 0.0)
        for column, value in recipe.paper.get(one.label, {}).items():
            paper.setdefault(f"paper, {column}", {})[x] = value
    values = {str(getattr(experiment.config, axis)): None for experiment in finished}
    if series:
        save_points(out / f"{recipe.name}.png", list(values), series, paper, axis, FIGURES[recipe.figure])


def _rows(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.pictures.plots import save_rows

    figures = {one.label: one.figures[recipe.figure] for one in results.combinations if recipe.figure in one.figures}
    rows = {  # in the recipe's order, where results have the best first
        label: (figures[label]["mean"], figures[label]["standard_deviation"] or 0.0)
        for label in dict.fromkeys(experiment.label for experiment in finished)
    }
    if rows:
        unit = next(one.unit for one in results.combinations if one.unit)
        save_rows(out / f"{recipe.name}.png", rows, f"{FIGURES[recipe.figure]}, {unit}")


def _heat_map(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.pictures.plots import save_heat_map

    def setting(config: Mapping[str, Any], name: str) -> str:
        return str(config["set"][name.removeprefix("set.")] if name.startswith("set.") else config[name])

    x, y = recipe.plot["x"], recipe.plot["y"]
    found = {one.label: one for one in results.combinations}
    values = {  # in the recipe's order, where results have the best first
        (setting(one.config, x), setting(one.config, y)): one.figures[recipe.figure]["mean"]
        for one in (found[label] for label in dict.fromkeys(experiment.label for experiment in finished))
    }
    if values:
        unit = next(one.unit for one in results.combinations if one.unit)
        names = (x.removeprefix("set."), y.removeprefix("set."), f"{FIGURES[recipe.figure]}, {unit}")
        save_heat_map(out / f"{recipe.name}.png", values, *names)


def _grid(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from torch import Generator

    from dgrad.pictures.image_grids import save_attribute_grid, save_class_grid
    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    for experiment in finished[:1]:
        model, _ = load_model(Run(experiment.path))
        generator = Generator().manual_seed(0)
        if experiment.config.attributes:
            save_attribute_grid(out / f"{recipe.name}.png", model, experiment.config.attributes, generator=generator)
        else:
            save_class_grid(out / f"{recipe.name}.png", model, generator=generator)


def _grids(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.pictures.image_grids import save_class_grids
    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    models = {
        experiment.label: load_model(Run(experiment.path))[0]
        for experiment in finished
        if experiment.config.seed == finished[0].config.seed
    }
    if models:
        save_class_grids(out / f"{recipe.name}.png", models)


def _race(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    """Curves by epoch and by time; and the time of a step as the latent grows, measured now."""
    from dgrad.experiments.timing import step_times
    from dgrad.files.atomic import write_text
    from dgrad.pictures.plots import save_race
    from dgrad.training.run_directory import Run

    lines: dict[str, list[list[dict[str, Any]]]] = {}
    for experiment in finished:
        lines.setdefault(experiment.label, []).append(Run(experiment.path).metrics())
    if not lines:
        return
    plot = recipe.plot
    configs = {experiment.label: experiment.config for experiment in finished if experiment.label in plot["latents"]}
    steps = step_times(configs, plot["latents"], plot["sizes"], plot["rounds"])
    write_text(
        out / f"{recipe.name}-steps.json", as_text({"unit": "seconds, median", "by": plot["size"], "steps": steps})
    )
    unit = next(one.unit for one in results.combinations if one.unit)
    save_race(out / f"{recipe.name}.png", lines, unit, steps, plot["size"])


def _diagnosis(recipe: Recipe, finished: list[Experiment], results: Results, out: Path) -> None:
    from dgrad.experiments.diagnosis import choose_images, diagnose
    from dgrad.experiments.variants import read_variants
    from dgrad.files.atomic import write_text
    from dgrad.pictures.plots import save_diagnosis
    from dgrad.training.build import Build
    from dgrad.training.run_directory import Run
    from dgrad.training.trained_model import load_model

    for experiment in finished[:1]:
        model, _ = load_model(Run(experiment.path))
        images = choose_images(Build(experiment.config).evaluation_data.valid, recipe.plot["images"], 0)
        diagnosis = diagnose(model, images, read_variants(recipe.plot["estimators"], recipe.plot["set"]))
        write_text(out / f"{recipe.name}-diagnosis.json", as_text(diagnosis.to_json()))
        save_diagnosis(out / f"{recipe.name}.png", diagnosis)


PLOTS: dict[str, Callable[[Recipe, list[Experiment], Results, Path], None]] = {
    "curves": _curves,
    "points": _points,
    "rows": _rows,
    "heat map": _heat_map,
    "grid": _grid,
    "grids": _grids,
    "race": _race,
    "diagnosis": _diagnosis,
}
