"""Tables and plots of what was measured: report.md, results.json and PNG files.

Imports matplotlib only where it draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgrad.files.atomic import atomic_file


@dataclass(frozen=True)
class Table:
    """A table of text; the first column is a name, the others are figures."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table under a heading of its own."""
        rules = ["---", *["---:"] * (len(self.columns) - 1)]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in (self.columns, rules, *self.lines))
        return "\n\n".join(part for part in (f"### {self.title}", rows, self.note) if part)


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, a panel for each group: `{group: {name: value}}`, with a line at 1."""

    name: str
    title: str
    groups: Mapping[str, Mapping[str, float]]
    logarithmic: bool = False

    def draw(self, path: Path) -> None:
        """Write the PNG."""
        longest = max(map(len, self.groups.values()))
        figure, panels = _figure(len(self.groups), 4.5, 1.5 + 0.22 * longest)
        for panel, (group, values) in zip(panels, self.groups.items(), strict=True):
            items = sorted(values.items(), key=lambda item: item[1], reverse=True)
            panel.barh([name for name, _ in items], [value for _, value in items], color="tab:blue", height=0.7)
            for place, (_, value) in enumerate(items):
                panel.text(value, place, f" {value:.3g}", va="center", fontsize=7)
            panel.axvline(1, color="black", linewidth=0.7)
            panel.set_title(group, fontsize=9)
            panel.tick_params(labelsize=7)
            panel.margins(x=0.15)
            if self.logarithmic:
                panel.set_xscale("log")
                _plain_numbers(panel.xaxis)
        figure.suptitle(self.title, fontsize=10)
        _save(figure, path)


@dataclass(frozen=True)
class Lines:
    """Lines through points, a panel for each group: `{group: {name: (xs, ys)}}`.

    Attributes:
        mark: a horizontal line, and what it is.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    logarithmic: bool = True
    mark: tuple[float, str] | None = None

    def draw(self, path: Path) -> None:
        """Write the PNG."""
        figure, panels = _figure(len(self.groups), 4.5, 3.8)
        names = list(dict.fromkeys(name for series in self.groups.values() for name in series))
        for panel, (group, series) in zip(panels, self.groups.items(), strict=True):
            for name, (xs, ys) in series.items():  # a name has one colour in all panels
                marker = "." if len(xs) < 20 else None
                panel.plot(xs, ys, marker=marker, color=f"C{names.index(name)}", label=name)
            if self.mark is not None:
                panel.axhline(self.mark[0], color="black", linewidth=0.7, linestyle="--", label=self.mark[1])
            if self.logarithmic:
                panel.set_xscale("log")
                panel.set_yscale("log")
                _plain_numbers(panel.xaxis, panel.yaxis)
            panel.set_title(group, fontsize=9)
            panel.set_xlabel(self.x_label)
            panel.set_ylabel(self.y_label)
            panel.legend(fontsize=7)
            panel.grid(alpha=0.3)
        figure.suptitle(self.title, fontsize=10)
        _save(figure, path)


Plot = Bars | Lines


def _figure(count: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _plain_numbers(*axes: Any) -> None:
    """Label logarithmic axes 120, 140 and not 1.2 x 10^2."""
    from matplotlib.ticker import LogFormatter

    for axis in axes:
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def milliseconds(row: Mapping[str, float]) -> list[str]:
    """The median and the quartiles of times, as a table has them."""
    median, lower, upper = (1000 * row[name] for name in ("median", "lower_quartile", "upper_quartile"))
    return [f"{median:.3g}", f"{lower:.3g} to {upper:.3g}"]


def microseconds(row: Mapping[str, float]) -> list[str]:
    """The same in millionths of a second."""
    return milliseconds({name: 1000 * row[name] for name in ("median", "lower_quartile", "upper_quartile")})


def ratio(row: Mapping[str, Any], reference: str, *, inverse: bool = False) -> str:
    """The ratio of medians to the reference's and, in brackets, of least times; `inverse`: the reference's to this."""
    numbers = (row[kind][reference] ** (-1 if inverse else 1) for kind in ("ratios", "least_ratios"))
    return "{} ({})".format(*(f"{number:.{1 if number >= 10 else 2}f}" for number in numbers))


def nested_lines(figures: Mapping[str, Mapping[str, Any]], reference: str) -> list[list[str]]:
    """The lines of a table of `{case: {mode: times}}`, with ratios to one of the modes."""
    return [
        [case, mode, *milliseconds(row), ratio(row, reference)]
        for case, modes in figures.items()
        for mode, row in modes.items()
    ]


@dataclass(frozen=True)
class Section:
    """A part in the report: what it is about, its tables and its plots."""

    about: str
    tables: Sequence[Table]
    plots: Sequence[Plot]


def report(parts: Mapping[str, Mapping[str, Any]], sections: Mapping[str, Section]) -> str:
    """The text of report.md.

    Args:
        parts: of each part, what results.json says of it.
        sections: what is shown of it.
    """
    text = [
        "# Benchmarks",
        "Times are medians; every comparison is a ratio within one run, in which the contestants took turns. In "
        "brackets: the ratio of the least times, which other work on the machine disturbs less.",
    ]
    for name, section in sections.items():
        text += [f"## {name}", section.about, _circumstances(parts[name])]
        text += [table.markdown() for table in section.tables]
        text += [f"![{plot.title}]({plot.name}.png)" for plot in section.plots]
    return "\n\n".join(text) + "\n"


def _circumstances(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    software = f"torch {machine['torch']}, python {machine['python']}, dgrad {machine['dgrad']}"
    return (
        f"{machine['date']}: {machine['device']}, {machine['processor']} ({machine['torch_uses']}, "
        f"{machine['cores']} cores, load {machine['load']}), {machine['threads']} threads, {software}; "
        f"{part['data']} images; compile {part['compile']}."
    )
