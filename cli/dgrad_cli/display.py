"""What the commands print: tables, JSON, and the progress of a training run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dgrad.training.listener import Listener, Progress

if TYPE_CHECKING:
    from dgrad.config import TrainConfig

OF_GREY_PIXELS = {"bits_per_dimension": "bits per dimension", "psnr": "PSNR"}
"""The columns of figures of grey pixels."""
SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_STEPS = 1.0
"""After so many seconds, and at least two steps, a step's time is known."""
LONG_RUN = 60.0
"""Of a run that takes so many seconds or more, the expected time is said."""
SECONDS_BETWEEN_BARS = 0.1
"""Moving the bar takes the host longer than launching a whole recorded step."""


def print_json(value: Any) -> None:
    """Print a value as JSON on the standard output."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table that fits the terminal; as plain wide text where there is none."""
    console = Console()
    table = Table(*columns, box=None, pad_edge=False, header_style="bold", show_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: brackets in a cell are no markup
    if not console.is_terminal:
        console = Console(width=max(console.width, 160))
    console.print(table)


@contextmanager
def counting(what: str, total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done; a bar on stderr shows it, where that is a terminal."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda more: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)


def with_spread(mean: float | None, spread: float | None) -> str:
    """`21.37 ± 0.42`, without a spread where there is one seed; `-` for nothing."""
    if mean is None:
        return "-"
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def figures(metrics: Mapping[str, Any], prefix: str, unit: str) -> str:
    """`21.37 nats (reconstruction 15.20, KL 6.17)`, and what else there is: Gaussian KL, grey pixels, accuracy."""
    parts = [f"reconstruction {metrics[f'{prefix}_reconstruction']:.2f}", f"KL {metrics[f'{prefix}_kl']:.2f}"]
    if f"{prefix}_gaussian_kl" in metrics:
        parts.append(f"Gaussian KL {metrics[f'{prefix}_gaussian_kl']:.2f}")
    if f"{prefix}_bits_per_dimension" in metrics:
        parts.append(f"{metrics[f'{prefix}_bits_per_dimension']:.3f} bits per dimension")
    if f"{prefix}_psnr" in metrics:
        parts.append(f"PSNR {metrics[f'{prefix}_psnr']:.2f} dB")
    return f"{metrics[f'{prefix}_bound']:.2f} {unit} ({', '.join(parts)}){_accuracy(metrics, f'{prefix}_accuracy')}"


def _accuracy(metrics: Mapping[str, Any], key: str) -> str:
    """`, accuracy 97.50 % (Eyeglasses 99.0, Smiling 96.0)`, or nothing where there is none."""
    if key not in metrics:
        return ""
    of = f"{key}_"
    by_class = [f"{name.removeprefix(of)} {100 * value:.1f}" for name, value in metrics.items() if name.startswith(of)]
    return f", accuracy {100 * metrics[key]:.2f} %" + (f" ({', '.join(by_class)})" if by_class else "")


def code_figures(code: Mapping[str, Any]) -> str:
    """`9,874 distinct codes for 10,000 images, 8.25 nats of information; 9.8 of 10 values in use, perplexity 8.90`."""
    text = f"{code['distinct_codes']:,} distinct codes for {code['images']:,} images"
    if code["information"] is not None:
        text += f", {code['information']:.2f} nats of information"
    if "values" in code:
        used, values = (f"{code[name]:.1f}".removesuffix(".0") for name in ("values_in_use", "values"))
        text += f"; {used} of {values} values in use, perplexity {code['perplexity']:.2f}"
    return text


def warn_of_collapse(code: Mapping[str, Any] | None, config: TrainConfig) -> None:
    """Say on the standard error where a code has collapsed, and what to try."""
    from dgrad.training.figures import collapse_warning

    warning = collapse_warning(code, config)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)


class Watcher(Listener):
    """Follows a training run: a live bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool, to_stderr: bool, label: str = "") -> None:
        self.label = label  # which of several runs it is
        self.console = Console(stderr=to_stderr, highlight=False)
        self.quiet = quiet
        self.live = not quiet and self.console.is_terminal
        self.bar: Bar | None = None
        self.last_line = -SECONDS_BETWEEN_LINES
        self.last_bar = -SECONDS_BETWEEN_BARS
        self.first_step = 0
        self.first_seconds = 0.0
        self.seconds_of_first_step = 0.0
        self.cost_is_known = False

    def started(self, progress: Progress) -> None:
        """Say what is trained, on what."""
        run, step = progress.run, progress.step
        self.first_step, self.first_seconds = step, progress.seconds
        config = run.config
        if not self.quiet and not (self.live and self.label):
            prefix = f"{self.label}: " if self.label else ""
            processes = f", {run.processes} processes" if run.processes > 1 else ""
            share = f", from step {step}" if step else ""
            labels = f", {run.labelled_images} labelled images" if run.labelled_images else ""
            before = 0 if step else config.pretrain_steps
            pretraining = f" after {before} on labelled images alone" if before else ""
            self.console.print(
                f"{prefix}training {config.estimator} on {config.dataset}, latent {config.latent}{labels}, "
                f"{run.steps} steps{pretraining}{share}, on {run.device}{processes}",
                soft_wrap=True,
            )
            if run.choices:
                self.console.print(f"{prefix}chosen: {', '.join(run.choices)}", soft_wrap=True)
        if self.live:
            columns = (
                TextColumn("{task.description}epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("bound {task.fields[bound]}"),
                TextColumn("{task.fields[rate]} steps/s"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self.bar.add_task(
                f"{self.label}: " if self.label else "", total=run.steps, completed=step, epoch="0", bound="-", rate="-"
            )
            self.bar.start()

    def pretrained(self, progress: Progress) -> None:
        """Count in the place of the epoch, now and then."""
        made, total = progress.pretrained, progress.run.config.pretrain_steps
        if self.bar is not None and self._bar_is_due(last=made == total):
            self.bar.update(self.bar.task_ids[0], epoch=f"0, pretraining {made}/{total}")

    def stepped(self, progress: Progress) -> None:
        """Move the bar now and then. Say once what the run will take."""
        if not self.cost_is_known:
            self._measure_cost(progress)
        if self.bar is not None and self._bar_is_due(last=progress.done):
            self.bar.update(self.bar.task_ids[0], completed=progress.step, rate=f"{self._rate(progress):.0f}")

    def _measure_cost(self, progress: Progress) -> None:
        """When a few steps are made, say what one takes, if the run is long; the first has to warm up."""
        made = progress.step - self.first_step
        if made <= 1:
            self.seconds_of_first_step = progress.seconds
        elif progress.seconds - self.first_seconds >= SECONDS_OF_STEPS:
            self.cost_is_known = True
            seconds = (progress.seconds - self.seconds_of_first_step) / (made - 1)
            left = seconds * (progress.steps - progress.step)
            if left >= LONG_RUN and not self.quiet:
                self.console.print(cost_line(progress, seconds, left), soft_wrap=True)

    def _bar_is_due(self, *, last: bool) -> bool:
        now = time.monotonic()
        if now - self.last_bar < SECONDS_BETWEEN_BARS and not last:
            return False
        self.last_bar = now
        return True

    def evaluated(self, progress: Progress) -> None:
        """Show the figures of an evaluation."""
        metrics = progress.metrics or {}
        if self.bar is not None:
            bound = f"{metrics['valid_bound']:.2f}"
            if "valid_accuracy" in metrics:
                bound += f", accuracy {100 * metrics['valid_accuracy']:.2f} %"
            self.bar.update(self.bar.task_ids[0], epoch=f"{metrics['epoch']:g}", bound=bound)
        elif not self.quiet and (time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or progress.done):
            self.last_line = time.monotonic()
            rate = self._rate(progress)
            left = (progress.steps - progress.step) / rate
            self.console.print(
                f"epoch {metrics['epoch']:g}: bound {figures(metrics, 'valid', progress.run.unit)}, "
                f"{rate:.0f} steps/s, {duration(left)} left",
                soft_wrap=True,
            )

    def _rate(self, progress: Progress) -> float:
        return (progress.step - self.first_step) / max(progress.seconds - self.first_seconds, 1e-9)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


def cost_line(progress: Progress, seconds: float, left: float) -> str:
    """What a step takes, what the remaining ones will take, and what would be cheaper.

    Args:
        seconds: of one step.
        left: of all remaining steps.
    """
    run = progress.run
    count = run.evaluations
    evaluations = f"{count} evaluation{'s' if count > 1 else ''} of the decoder for an image"
    cheaper = ", ".join(run.cheaper) or "fewer --epochs"
    step = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s"
    return (
        f"a step takes {step}, {evaluations}: about {duration(left)} for "
        f"{progress.steps - progress.step} steps, without evaluations of the bound; cheaper: {cheaper}"
    )


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(59.4), duration(61), duration(3720)
    ('59 s', '1 min 1 s', '1 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
