"""Curves, comparisons and diagnoses as plots."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dgrad.experiments.variants import float_or_inf
from dgrad.files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dgrad.experiments.comparison import Comparison
    from dgrad.experiments.diagnosis import Diagnosis, Row
    from dgrad.vae.usage import Variables


def save_curves(path: Path, metrics: list[dict[str, Any]], unit_name: str, title: str) -> None:
    """Write the validation bound, its two terms and the training loss against epochs."""
    epochs = [line["epoch"] for line in metrics]
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for key, label, style in (
        ("valid_bound", "bound (validation)", {"color": "C0", "linewidth": 2}),
        ("train_loss", "trained loss (training)", {"color": "C1"}),
        ("valid_reconstruction", "reconstruction (validation)", {"color": "C2", "linestyle": "--"}),
        ("valid_kl", "KL (validation)", {"color": "C3", "linestyle": "--"}),
    ):
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, [line[key] for line in metrics], label=label, marker=marker, **style)
    axes.set(xlabel="epoch", ylabel=unit_name, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def save_usage(path: Path, variables: Variables | None, title: str) -> None:
    """Write how frequent the values of each variable are, and how much each variable tells of the image."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9, 4)
    if variables is None:
        figure.suptitle(f"{title}: this latent has no marginal probabilities")
        _save(figure, path)
        return
    of_values, of_variables = figure.subplots(1, 2)
    count, style = len(variables.values), {"color": "black", "linestyle": "--", "linewidth": 1}
    alpha = max(0.2, count**-0.5)
    for frequencies, values in zip(variables.frequencies, variables.values, strict=True):
        shares = frequencies.sort(descending=True).values[:values]
        marker = "o" if values <= 20 else None
        of_values.plot(range(1, values + 1), shares, color="C0", alpha=alpha, marker=marker, markersize=3)
    for values in sorted({*variables.values}):
        of_values.plot([1, values], [1 / values] * 2, **style)
    of_values.set(xlabel="value, by frequency", ylabel="share of the images", yscale="log", title="values")
    of_values.set_ylim(bottom=min(1e-3, 0.1 / max(variables.values)))
    of_variables.bar(range(1, count + 1), sorted(variables.information, reverse=True), color="C0")
    of_variables.axhline(math.log(max(variables.values)), **style)
    of_variables.set(xlabel="variable, by information", ylabel="nats", title="information (dashed: the most)")
    of_variables.set_xlim(0, max(count, 5) + 1)
    for axes in (of_values, of_variables):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    _save(figure, path)


def save_diagnosis(path: Path, diagnosis: Diagnosis) -> None:
    """Write bias and deviation side by side, against the hyper-parameter that has several values.

    Each estimator has a line, or a point where no hyper-parameter has several values. A bias that cannot be told from
    none has a hollow marker, or a dotted line, at the most that it can be.
    """
    from matplotlib.lines import Line2D

    rows = [row for row in diagnosis.rows if row.bias is not None]
    lines = _lines(rows)
    none = [
        label
        for label, members in lines.items()
        if max(max(row.deviation or 0.0, row.bias or 0.0) for row in members) <= 1e-3 * diagnosis.gradient
    ]
    named = {label: f"{label} (no bias, no deviation)" if label in none else label for label in lines}
    names = sorted({name for name in map(_axis, rows) if name is not None})
    figure = _figure(11, 5) if names else _figure(11, 2.2 + 0.28 * len(lines))
    both = figure.subplots(1, 2, sharey=not names)
    titles = ("bias: mean |E[g] - gradient|", "standard deviation of one draw")
    unit = f"{diagnosis.unit} per unit of a logit"
    for axes, key, title in zip(both, ("bias", "deviation"), titles, strict=True):
        for index, (label, members) in enumerate(lines.items()):
            bounded = [key == "bias" and bool(row.within_noise) for row in members]
            values = [
                (row.bias_at_most if most else row.bias_corrected if key == "bias" else row.deviation) or 0.0
                for row, most in zip(members, bounded, strict=True)
            ]
            # A logarithmic axis has no place for what is next to nothing.
            values = [value if value > 1e-3 * diagnosis.gradient else math.nan for value in values]
            if names:
                _draw_line(axes, [_x(row) for row in members], values, bounded, _colour(index, len(lines)), label)
            else:
                _draw_points(axes, values, [index], bounded, "C0")
        if names:
            axes.axhline(diagnosis.gradient, color="black", linewidth=1, label="mean |gradient|")
            axes.set(xscale="log", yscale="log", xlabel=", ".join(names), ylabel=unit, title=title)
        else:
            axes.axvline(diagnosis.gradient, color="black", linewidth=1, label="mean |gradient|")
            axes.set(xscale="log", xlabel=unit, title=title)
            axes.set_yticks(range(len(lines)), list(named.values()))
            axes.set_ylim(len(lines) - 0.5, -0.5)
        for axis in (axes.xaxis, axes.yaxis) if names else (axes.xaxis,):
            _plain_logarithmic(axis)
        axes.grid(alpha=0.3, which="both")
    handles, labels = both[0].get_legend_handles_labels()
    labels = [named.get(label, label) for label in labels]
    if any(row.within_noise for row in rows):
        hollow = Line2D([], [], color="0.3", marker="v", markerfacecolor="white", markersize=7)
        hollow.set_linestyle(":" if names else "none")
        handles.append(hollow)
        labels.append("at most this: within the noise of the draws")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    noun = "image" if diagnosis.images == 1 else "images"
    exact = diagnosis.reference == "exact"
    source = "the exact gradient" if exact else f"{diagnosis.reference_draws} draws of {diagnosis.reference}"
    figure.suptitle(
        f"Gradient of the reconstruction loss for the logits, latent {diagnosis.latent}, {diagnosis.images} {noun}, "
        f"{diagnosis.draws} draws, against {source}",
        fontsize=11,
    )
    _save(figure, path)


def _plain_logarithmic(axis: Any) -> None:
    """Numbers as they are at 1, 2 and 5 of each decade of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_line(
    axes: Any, x: list[float | None], values: list[float], bounded: list[bool], colour: Any, label: str
) -> None:
    """A line through values: solid between known ones, dotted to those only bounded, level where there is no x."""
    if x[0] is None:
        axes.axhline(values[0], color=colour, label=label, linestyle=":" if bounded[0] else "--")
        return
    axes.plot(x, values, color=colour, linestyle=":")
    known = [math.nan if most else value for value, most in zip(values, bounded, strict=True)]
    axes.plot(x, known, color=colour, label=label)
    _draw_points(axes, x, values, bounded, colour)


def _draw_points(axes: Any, x: list[Any], y: list[Any], bounded: list[bool], colour: Any) -> None:
    for across, up, most in zip(x, y, bounded, strict=True):
        marker, face = ("v", "white") if most else ("o", colour)
        axes.plot([across], [up], marker, color=colour, markerfacecolor=face, markersize=7)


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by the line they are on: one for each estimator and each choice of all that the axis does not show."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        others = [f"{name}={row.set[name]}" for name in row.swept if name != _axis(row)]
        label = " ".join([row.estimator, *others])
        lines.setdefault(label, []).append(row)
    return lines


def _axis(row: Row) -> str | None:
    """The first of the hyper-parameters with several values that can stand on a logarithmic axis."""
    return next((name for name in row.swept if 0 < float_or_inf(row.set[name]) < math.inf), None)


def _x(row: Row) -> float | None:
    name = _axis(row)
    return None if name is None else float_or_inf(row.set[name])


LINE_STYLES = ("-", "--", ":")
"""Of the first twenty lines of a comparison, the next twenty, and the rest."""
LEGEND_CHARACTERS = 135
"""How many fit into a row of its legend."""


def save_comparison(path: Path, comparison: Comparison) -> None:
    """Write the validation bound by epoch and by seconds: the mean over seeds, in a band from least to greatest."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in comparison.rows if row.curve]
    columns = max(1, LEGEND_CHARACTERS // (6 + max((len(row.label) for row in rows), default=0)))
    figure = _figure(11, 5 + 0.2 * max(0, math.ceil(len(rows) / columns) - 2))
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    late = []
    for index, row in enumerate(rows):
        colour = _colour(index, len(rows))
        curve = row.curve
        bounds = [point["valid_bound"] for point in curve]
        for axes, key in ((by_epoch, "epoch"), (by_time, "seconds")):
            x = [point[key] for point in curve]
            marker = "o" if len(x) == 1 else None
            style = LINE_STYLES[index // 20 % len(LINE_STYLES)]
            axes.plot(x, bounds, color=colour, marker=marker, label=row.label, linestyle=style)
            least, greatest = ([point[end] for point in curve] for end in ("least", "greatest"))
            axes.fill_between(x, least, greatest, color=colour, alpha=0.2, linewidth=0)
        late += [bounds[-1], bounds[len(bounds) // 5]]
    # The first evaluations would press the rest together.
    low = min((point["least"] for row in rows for point in row.curve), default=0.0)
    # So would, among many, the worst: the highest tenth may run out of the picture; the table has its figures.
    high = sorted(late)[len(late) * 9 // 10 if len(rows) > 10 else -1] if late else 1.0
    margin = 0.05 * (high - low) or 1.0
    by_epoch.set(xlabel="epoch", ylabel=f"validation bound ({comparison.unit})", ylim=(low - margin, high + margin))
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    by_time.set(xlabel="seconds of the run, evaluations included")
    seconds = [row.curve[-1]["seconds"] for row in rows]
    if seconds and max(seconds) > 10 * min(seconds):
        by_time.set_xscale("log")
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    band = "mean, and band from least to greatest" if comparison.seeds > 1 else "one run each"
    config = comparison.config
    figure.suptitle(
        f"{Path(config['dataset']).name}, latent {config['latent']}, KL {config['kl']}, {seeds}: {band}", fontsize=11
    )
    figure.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    _save(figure, path)


def save_bound_curves(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]], unit: str
) -> None:
    """Write the validation bound by epoch, in panels: the mean over seeds, in a band from least to greatest.

    Args:
        panels: the title of each panel, in it the label of each line, and for that the metrics of each seed.
    """
    figure = _figure(max(5.5, 4.2 * len(panels)), 4.2)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_bounds(axes, {label.replace(title, "").strip() or label: runs for label, runs in lines.items()}, "epoch")
        axes.set(title=title)
        axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel(f"validation bound ({unit})")
    _save(figure, path)


def save_race(
    path: Path,
    lines: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    unit: str,
    steps: Mapping[str, Mapping[int, float]],
    x_name: str,
) -> None:
    """Write the validation bound by epoch and by seconds, and the time of a training step as the latent grows.

    Args:
        lines: the label of each line, and for that the metrics of each seed.
        steps: for labels of lines, the seconds of a step by the size of the latent.
    """
    figure = _figure(14, 4.6)
    by_epoch, by_time, by_size = figure.subplots(1, 3)
    _draw_bounds(by_epoch, lines, "epoch")
    _draw_bounds(by_time, lines, "seconds")
    by_epoch.set_ylabel(f"validation bound ({unit})")
    by_time.set_xlabel("seconds of the run, evaluations included")
    for label, seconds in steps.items():
        colour = _colour(list(lines).index(label), len(lines))
        by_size.plot(list(seconds), [1000 * value for value in seconds.values()], "o-", color=colour)
    by_size.set(xscale="log", yscale="log", xlabel=x_name, ylabel="a training step (ms, median)")
    sizes = sorted({size for seconds in steps.values() for size in seconds})
    _plain_logarithmic(by_size.yaxis)
    by_size.set_xticks(sizes, [str(size) for size in sizes])
    by_size.minorticks_off()
    by_size.grid(alpha=0.3)
    figure.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def _draw_bounds(axes: Any, lines: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], x_name: str) -> None:
    """The validation bound by `epoch` or mean `seconds`: the mean over seeds, in a band from least to greatest."""
    from matplotlib.ticker import MaxNLocator

    low, high = math.inf, -math.inf
    for index, (label, runs) in enumerate(lines.items()):
        shortest = min(map(len, runs))
        x = [statistics.fmean(run[at][x_name] for run in runs) for at in range(shortest)]
        bounds = [[run[at]["valid_bound"] for run in runs] for at in range(shortest)]
        means = [statistics.fmean(values) for values in bounds]
        colour, marker = _colour(index, len(lines)), "o" if shortest == 1 else None
        axes.plot(x, means, color=colour, label=label, marker=marker)
        axes.fill_between(x, list(map(min, bounds)), list(map(max, bounds)), color=colour, alpha=0.2, linewidth=0)
        low = min(low, *map(min, bounds))
        high = max(high, means[len(means) // 5], *bounds[-1])  # the first evaluations would press the rest together
    margin = 0.05 * (high - low) or 1.0
    axes.set(xlabel=x_name, ylim=(low - margin, high + margin))
    if x_name == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def save_points(
    path: Path,
    order: Sequence[str],
    series: Mapping[str, Mapping[str, tuple[float, float]]],
    paper: Mapping[str, Mapping[str, float]],
    x_name: str,
    y_name: str,
) -> None:
    """Write figures over a setting's values: ours with their standard deviation, the paper's as dashed lines."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    place = {value: index for index, value in enumerate(order)}
    for index, (name, points) in enumerate(series.items()):
        x = sorted(points, key=place.__getitem__)
        means, deviations = zip(*(points[value] for value in x), strict=True)
        colour = _colour(index, len(series) + len(paper))
        axes.errorbar([place[key] for key in x], means, deviations, color=colour, marker="o", capsize=3, label=name)
    for index, (name, known) in enumerate(paper.items(), len(series)):
        x = sorted(known, key=place.__getitem__)
        colour = _colour(index, len(series) + len(paper))
        axes.plot([place[key] for key in x], [known[key] for key in x], "--", marker="x", color=colour, label=name)
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.set_xticks(range(len(order)), order)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def save_rows(path: Path, rows: Mapping[str, tuple[float, float]], x_name: str) -> None:
    """Write a figure and its standard deviation in a row for each name, with a line through the first one's."""
    figure = _figure(9, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    means, deviations = zip(*rows.values(), strict=True)
    axes.axvline(means[0], color="0.6", linewidth=1, linestyle="--")
    axes.errorbar(means, range(len(rows)), xerr=deviations, fmt="o", capsize=3)
    for place, mean in enumerate(means):
        axes.annotate(f"{mean:.2f}", (mean, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=x_name, ylim=(len(rows) - 0.5, -0.5))
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def save_heat_map(
    path: Path, values: Mapping[tuple[str, str], float], x_name: str, y_name: str, value_name: str
) -> None:
    """Write a figure over two settings: `values` by their texts (x, y), in the order given. The least is framed."""
    from matplotlib.patches import Rectangle

    columns, rows = (list(dict.fromkeys(pair[axis] for pair in values)) for axis in (0, 1))
    table = torch.full((len(rows), len(columns)), torch.nan)
    for (x, y), value in values.items():
        table[rows.index(y), columns.index(x)] = value
    figure = _figure(2.5 + len(columns), 1.5 + 0.6 * len(rows))
    axes = figure.subplots()
    # most of the colours for the better half: a few that failed would leave the others alike
    top = float(table.nanmedian()) * 2 - float(table[~table.isnan()].min())
    image = axes.imshow(table.numpy(), cmap="viridis", vmax=top, aspect="auto", origin="lower")
    for (x, y), value in values.items():
        place = columns.index(x), rows.index(y)
        light = value < (top + float(table[~table.isnan()].min())) / 2
        axes.text(*place, f"{value:.1f}", ha="center", va="center", color="white" if light else "black")
    best = min(values, key=values.__getitem__)
    corner = (columns.index(best[0]) - 0.48, rows.index(best[1]) - 0.48)
    axes.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, edgecolor="white", linewidth=2))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=x_name, ylabel=y_name)
    figure.colorbar(image, ax=axes, label=value_name)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of an unwritable home
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _colour(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10" if count <= 10 else "tab20"].colors[index % 20]  # type: ignore[attr-defined]
