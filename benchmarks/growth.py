"""Time and memory of the sweep as the code, the batch and the decoder grow.

As a program, `python -m benchmarks.growth POINT DEVICE`, it prints the peak memory of one point, a JSON object, in
a process that did nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import exponent, in_new_process, peak_memory, seconds_of, spread, take_turns
from benchmarks.reporting import Lines, Table, milliseconds
from benchmarks.settings import PIXELS, Settings, sweep_problem, widely_spread
from dgrad.kernels import cpu
from dgrad.vae.networks import Decoder

ABOUT = """The sweep as training calls it, of one sample for each image, 784 pixels. All points of a series take
turns. Memory is what a sweep adds at its peak, its result included, each point in a process of its own. The
exponent p of `time = c size^p` is fitted from size 100 on: below it, what does not depend on the size decides."""
SIZES = (10, 30, 100, 300, 1000, 3000, 10000)
QUICK_SIZES = (100, 200)
FIT_FROM = 100
HIDDEN = 300
TARGET_BYTES, TARGET_LATENT, TARGET_BATCH = 256 * 2**20, "20x10", 1000
LONGEST = 60.0
"""Seconds that a sweep may take; larger points are skipped."""
SECONDS_EACH = 10.0
"""For each point; one that is slow is measured fewer times, but at least three."""


Groups = dict[str, dict[str, tuple[list[float], list[float]]]]


@dataclass(frozen=True)
class Point:
    """A sweep: which form (`mlp` is the difference form behind hidden units), and how large."""

    series: str
    size: int
    form: str
    latent: str
    batch: int = 100
    hidden: int = 0

    def __str__(self) -> str:
        return f"{self.series} {self.size} {self.form}"

    def bytes_needed(self) -> float:
        """About as much memory as the model, the codes, the images and the sweep take together."""
        n, k = map(int, self.latent.split("x"))
        weights = n * k * max(PIXELS, self.hidden) + self.hidden * PIXELS
        return 4 * (4 * weights + 6 * self.batch * n * k + 6 * self.batch * PIXELS)


def points(device: torch.device, sizes: tuple[int, ...]) -> Iterator[Point]:
    """All points, series by series, each form's in ascending order."""
    linear = ["compiled"] if device.type != "cpu" or cpu.available() else []
    linear += ["grouped", "exact"] if device.type == "cpu" else ["exact"]
    for form, hidden in [*((form, 0) for form in linear), ("mlp", HIDDEN)]:
        for size in sizes:
            yield Point("n k, with k = 10", size, form, f"{size // 10}x10", hidden=hidden)
            yield Point("n k, with n = 1", size, form, f"1x{size}", hidden=hidden)
            yield Point("batch, 20x10", size, form, TARGET_LATENT, batch=size, hidden=hidden)
    for size in sizes:
        yield Point("hidden units, 20x10", size, "mlp", TARGET_LATENT, hidden=size)


def sweep_of(point: Point, device: torch.device) -> Callable[[], Tensor]:
    """The point's sweep, its codes already evaluated, as an estimator does before it sweeps."""
    model, codes, images = sweep_problem(
        point.latent, point.batch, device, hidden=(point.hidden,) if point.hidden else ()
    )
    model.compiled_kernels = point.form == "compiled"
    if point.form == "exact" and device.type == "cpu":
        assert isinstance(model.decoder, Decoder)
        model.decoder.first.weight.data = widely_spread(model.decoder.first.weight)
    objective = model.reconstruction(images)
    with torch.no_grad():
        at = objective.at(codes)
    return at.sweep


def memory_of(point: Point, device: torch.device) -> int:
    """The peak memory of the point's sweep, in a new process. A small sweep goes first and loads what is needed."""
    sweep_of(replace(point, latent="2x3", batch=2), device)()
    return peak_memory(sweep_of(point, device), device)


def measure(settings: Settings) -> dict[str, Any]:
    """Times, memory and exponents, `{series: {"points": [...], "exponents": {form: p}}}`."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    everything = list(points(settings.device, sizes))
    names = dict.fromkeys(point.series for point in everything)
    return {name: _series([point for point in everything if point.series == name], settings) for name in names}


def _series(series: list[Point], settings: Settings) -> dict[str, Any]:
    sweeps: dict[str, Callable[[], Tensor]] = {}
    skipped: dict[str, str] = {}
    latest: dict[str, tuple[int, float]] = {}
    for point in series:  # once each, which warms up and shows what would take too long
        size, seconds = latest.get(point.form, (point.size, 0.0))
        if (expected := seconds * point.size / size) > LONGEST:
            skipped[str(point)] = f"would take {expected:.0f} s"
        elif point.bytes_needed() > _bytes_free(settings.device):
            skipped[str(point)] = "would not fit in memory"
        else:
            sweeps[str(point)] = sweep_of(point, settings.device)
            latest[point.form] = (point.size, seconds_of(sweeps[str(point)], settings.device))
    times = take_turns(sweeps, settings.rounds_or(20), settings.device, warm_up=0, seconds_each=SECONDS_EACH)
    lines = []
    for point in series:
        line = asdict(point)
        if str(point) in skipped:
            line["skipped"] = skipped[str(point)]
        else:
            line["seconds"] = spread(times[str(point)])
            if not settings.quick or point.size == series[-1].size:
                line["memory"] = in_new_process("benchmarks.growth", json.dumps(asdict(point)), str(settings.device))
        lines.append(line)
    return {"points": lines, "exponents": _exponents(lines)}


def _exponents(lines: list[dict[str, Any]]) -> dict[str, float]:
    fitted = {}
    for form in dict.fromkeys(line["form"] for line in lines):
        known = [line for line in lines if line["form"] == form and line["size"] >= FIT_FROM and "seconds" in line]
        if len(known) > 1:
            fitted[form] = exponent([line["size"] for line in known], [line["seconds"]["median"] for line in known])
    return fitted


def _bytes_free(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each series, and one that holds the memory against the target."""
    result = []
    for name, series in figures.items():
        lines = [[f"{line['form']}, {line['size']}", *_figures(line)] for line in series["points"]]
        exponents = ", ".join(f"{form} {value:.2f}" for form, value in series["exponents"].items())
        note = f"Exponents: {exponents}." if exponents else ""
        result.append(Table(name, ["form, size", "median, ms", "quartiles, ms", "peak memory, MiB"], lines, note))
    target = [
        line
        for series in figures.values()
        for line in series["points"]
        if (line["latent"], line["batch"]) == (TARGET_LATENT, TARGET_BATCH)
    ]
    if target:
        lines = [[line["form"], _mebibytes(line), _verdict(line)] for line in target]
        title = f"{TARGET_LATENT}, batch {TARGET_BATCH}: peak memory below {TARGET_BYTES // 2**20} MiB"
        result.append(Table(title, ["form", "MiB", "below"], lines))
    return result


def _figures(line: dict[str, Any]) -> list[str]:
    if "skipped" in line:
        return [line["skipped"], "", ""]
    return [*milliseconds(line["seconds"]), _mebibytes(line)]


def _mebibytes(line: dict[str, Any]) -> str:
    memory = line.get("memory")
    return f"{memory / 2**20:.1f}" if isinstance(memory, int) else "not measured"


def _verdict(line: dict[str, Any]) -> str:
    memory = line.get("memory")
    return "" if not isinstance(memory, int) else "yes" if memory < TARGET_BYTES else "no"


def plots(figures: dict[str, Any]) -> list[Lines]:
    """Time and memory against size, a panel for each series."""

    def groups(value: Callable[[dict[str, Any]], float | None]) -> Groups:
        result: Groups = {}
        for name, series in figures.items():
            result[name] = {}
            for line in series["points"]:
                number = value(line)
                if number is not None and number > 0:
                    sizes, values = result[name].setdefault(line["form"], ([], []))
                    sizes.append(line["size"])
                    values.append(number)
        return result

    seconds = groups(lambda line: 1000 * line["seconds"]["median"] if "seconds" in line else None)
    memory = groups(lambda line: line["memory"] / 2**20 if isinstance(line.get("memory"), int) else None)
    return [
        Lines("growth-time", "the sweep's time", "size", "ms", seconds),
        Lines("growth-memory", "the sweep's peak memory", "size", "MiB", memory, mark=(256, "256 MiB")),
    ]


if __name__ == "__main__":
    print(memory_of(Point(**json.loads(sys.argv[1])), torch.device(sys.argv[2])))
