"""`dgrad compare`: estimators trained alike. Torch and the core are imported inside the command alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dgrad.config import configure
from dgrad.errors import RunError
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.commands.sweep import STOPPED, stop_if
from dgrad_cli.commands.train import finish
from dgrad_cli.display import OF_GREY_PIXELS, Watcher, duration, print_json, print_table, with_spread
from dgrad_cli.options import Estimators, Json, Quiet, check_length, check_single, takes_settings
from dgrad_cli.writing import as_text, check_directory

if TYPE_CHECKING:
    from dgrad.experiments.comparison import Comparison
    from dgrad.experiments.experiment import Experiment


@takes_settings(
    but=("estimator", "seed"),
    several=("set",),
    shown={"kl": "outside, for all alike", "lr": "what suits the model, for all alike"},
)
def compare(
    *,
    out: Annotated[
        Path, typer.Option(help="The runs' directory; the same command again goes on where it stopped.", metavar="DIR")
    ],
    estimators: Estimators = "direct,gumbel-softmax,rloo",
    seeds: Annotated[int, typer.Option(help="Runs of each, with the seeds 0, 1, ...", metavar="N", min=1)] = 3,
    quiet: Quiet = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Train several estimators in the same way, several seeds each, and put them side by side.

    Each is an ordinary run in DIR/ESTIMATOR-seed0 and so on. Ranks go by the validation bound; test images choose
    nothing.
    """
    from dgrad.experiments.comparison import plan, summarize, train_all
    from dgrad.experiments.variants import read_variants
    from dgrad.files.atomic import write_text
    from dgrad.pictures.of_a_run import draw_missing_of
    from dgrad.pictures.plots import save_comparison
    from dgrad.training.trainer import Interrupted

    check_single("compare", given, ["latent"], "dgrad sweep takes several")
    check_length(given)
    load_plugins(given.get("plugins"))
    variants = read_variants(estimators, given.pop("set", ()))
    check_directory(out)
    entries = plan(configure(given), variants, seeds, out)
    number = {entry.path: f"{index} of {len(entries)}" for index, entry in enumerate(entries, 1)}
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    for label, limitation in {e.label: e.why_unsupported for e in entries if e.why_unsupported is not None}.items():
        notes.print(f"{label} is left out: {limitation}", markup=False)
    if not quiet and (done := sum(entry.why_unsupported is None and entry.finished for entry in entries)):
        notes.print(f"{done} of {len(entries)} runs in {out} are finished already", markup=False)

    def train(entry: Experiment) -> None:
        label = f"{number[entry.path]}, {entry.name}"
        watcher = Watcher(quiet=quiet, to_stderr=json, label=label)
        _, received = finish(*entry.open(watcher), watcher)
        stop_if(received[0] if received else None)

    try:
        problems = train_all(entries, train)
    except Interrupted as interruption:
        interruption.args = (STOPPED,)
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
    grey = [name for name in OF_GREY_PIXELS if any(getattr(row, name) is not None for row in comparison.rows)]
    columns += [OF_GREY_PIXELS[name] for name in grey]
    if seconds is not None:
        columns.append(f"validation after {seconds:.3g} s")
    if failed := any(row.problem for row in comparison.rows):
        columns.append("problem")
    rows = []
    for row in comparison.rows:
        cells = [
            "-" if row.rank is None else str(row.rank),
            row.label,
            with_spread(row.valid_bound, row.valid_bound_spread),
            with_spread(row.test_bound, row.test_bound_spread),
            "-" if row.evaluations is None else str(row.evaluations),
            "-" if row.seconds is None else f"{row.seconds:.3g}",
            *("-" if (value := getattr(row, name)) is None else f"{value:.3f}" for name in grey),
        ]
        if seconds is not None:
            cells.append(with_spread(row.valid_bound_at_equal_time, None))
        rows.append([*cells, row.problem or ""] if failed else cells)
    print_table(columns, rows)
    config = comparison.config
    length = f"{config['steps']} steps" if config["steps"] is not None else f"{config['epochs']} epochs"
    spread = f"mean ± standard deviation of {comparison.seeds} seeds" if comparison.seeds > 1 else "1 seed"
    print(
        f"\nBounds in {comparison.unit or 'nats'}, the lower the better, {spread}; {length}, "
        f"latent {config['latent']}, {config['dataset']}, KL {config['kl']} and lr {config['lr']} for all; "
        "ranks by validation."
    )
    print(
        "evaluations: of the decoder, for one example in one step. seconds: with the evaluations on validation images."
    )
    if seconds is not None:
        time = duration(seconds) if seconds >= 1 else f"{seconds:.3g} s"
        print(f"validation after {time}: the best bound by the time the fastest estimator was done.")
    pictures = ", comparison.png" if any(row.curve for row in comparison.rows) else ""
    print(f"{out}: comparison.json{pictures}, and a run directory for each seed")
