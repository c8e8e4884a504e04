"""Measures dgrad's speed and writes a report: tables, results.json and plots.

    python -m benchmarks [PART ...] --out DIR [--data-root DIR]

Every comparison is a ratio within one run, in which the contestants take turns, so that a machine whose speed
drifts slows all of them alike. Ratios can be compared between machines; milliseconds cannot. Parts that are
measured later into the same directory join the others in its report. The same command goes on with an interrupted
`library` where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import dgrad
from benchmarks import deep, device, growth, library, machine, naive, refined, reporting, run, steps, support, sweep
from benchmarks.settings import Settings, invented_images
from dgrad.config import COMPILE_MODES, configure
from dgrad.devices import choose_device
from dgrad.errors import DgradError, InputError, unknown_name
from dgrad.files.atomic import write_text
from dgrad.training.build import Build


class Part(Protocol):
    """What the module of a part offers."""

    ABOUT: str

    def measure(self, settings: Settings) -> dict[str, Any]:
        """The figures, as JSON has them."""

    def tables(self, figures: dict[str, Any]) -> Sequence[reporting.Table]:
        """What report.md shows of the figures."""

    def plots(self, figures: dict[str, Any]) -> Sequence[reporting.Plot]:
        """What is drawn of them."""


PARTS: dict[str, Part] = {
    "steps": steps,
    "library": library,
    "sweep": sweep,
    "deep": deep,
    "support": support,
    "refined": refined,
    "growth": growth,
    "naive": naive,
    "run": run,
    "device": device,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        chosen = _chosen(given)
        path = given.out / "results.json"
        parts = _earlier(path)
        with tempfile.TemporaryDirectory() as directory:
            settings = _settings(given, Path(directory))
            given.out.mkdir(parents=True, exist_ok=True)
            for name in chosen:
                unfinished = given.out / f"{name}-unfinished.json"
                parts[name] = _measure(name, replace(settings, unfinished=unfinished))
                _write(given.out, parts)
                unfinished.unlink(missing_ok=True)
    except DgradError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    print(given.out / "report.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them without any")
    parser.add_argument("--out", type=Path, required=True, help="the directory for report.md, results.json and plots")
    parser.add_argument("--data-root", help="where MNIST is; images of the same size are invented without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="few rounds of few small cases: does everything work?")
    parser.add_argument("--rounds", type=_positive, help="measured turns (default: what suits the part)")
    parser.add_argument(
        "--latents", default=",".join(Settings.latents), help="of steps, sweep, deep, naive (default: %(default)s)"
    )
    parser.add_argument("--estimators", help="of steps, naive, run: names with commas (default: what suits the part)")
    of_seconds = "of training after which run gives up (default: %(default)g)"
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help=of_seconds)
    parser.add_argument(
        "--compile", default=Settings.compile, choices=COMPILE_MODES, help="compiled kernels (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, of which there are quartiles; got {text}")
    return number


def _chosen(given: argparse.Namespace) -> list[str]:
    """The parts to measure, in the order in which they stand in the report."""
    for name in given.parts:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    if given.out.exists() and not given.out.is_dir():
        raise InputError(f"{given.out} is a file; expected a directory for the report: choose another --out")
    unmet = _unmet(given)
    for name, need in unmet.items():
        if name in given.parts:
            raise InputError(need)
        if not given.parts:
            print(f"left out: {need}", file=sys.stderr)
    return [name for name in PARTS if name in given.parts or (not given.parts and name not in unmet)]


def _unmet(given: argparse.Namespace) -> dict[str, str]:
    """What the parts need that cannot be measured here."""
    unmet = {}
    if given.data_root is None:
        unmet["run"] = "run needs MNIST, whose images 110 nats are about: say where it is with --data-root DIR"
    if (kind := choose_device(given.device).type) != "cuda":
        unmet["device"] = f"device needs a CUDA device; got {kind}: run it on a machine that has one"
    return unmet


def _settings(given: argparse.Namespace, directory: Path) -> Settings:
    """The settings, tried out: whatever cannot be comes out before anything is measured."""
    mnist = given.data_root is not None
    data = {"dataset": "mnist", "data-root": given.data_root} if mnist else {"dataset": str(invented_images(directory))}
    latents = tuple(filter(None, given.latents.split(",")))
    estimators = None if given.estimators is None else tuple(filter(None, given.estimators.split(",")))
    if not latents or estimators == ():
        raise InputError("--latents and --estimators expect names with commas, such as 20x10,20x2; got none")
    for latent in latents:
        dgrad.latent(latent)
    for estimator in estimators or ():
        dgrad.estimator(estimator)
    Build(configure(data)).dataset  # noqa: B018
    device = choose_device(given.device)
    return Settings(data, mnist, device, given.rounds, given.quick, latents, estimators, given.seconds, given.compile)


def _measure(name: str, settings: Settings) -> dict[str, Any]:
    """A part's entry in results.json."""
    where = machine.describe(settings.device)
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    figures = PARTS[name].measure(settings)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    return {
        "machine": where,
        "data": "mnist" if settings.mnist else "invented",
        "compile": settings.compile,
        "quick": settings.quick,
        "seconds": round(seconds, 1),
        "figures": figures,
    }


def _earlier(path: Path) -> dict[str, Any]:
    """The parts that are in the directory already."""
    if not path.exists():
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        earlier = {name: parts[name] for name in PARTS if name in parts}
        reporting.report(earlier, _sections(earlier))  # what cannot be shown would spoil the new report
        return earlier
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no results.json of these benchmarks; choose another --out, or delete it") from None


def _sections(parts: dict[str, Any]) -> dict[str, reporting.Section]:
    """What the report shows of each part."""
    shown = [(name, part, parts[name]["figures"]) for name, part in PARTS.items() if name in parts]
    return {name: reporting.Section(part.ABOUT, part.tables(got), part.plots(got)) for name, part, got in shown}


def _write(out: Path, parts: dict[str, Any]) -> None:
    """All that is known so far, so that an interruption loses one part at most."""
    write_text(out / "results.json", json.dumps({"parts": parts}, indent=1, allow_nan=False) + "\n")
    sections = _sections(parts)
    for section in sections.values():
        for plot in section.plots:
            plot.draw(out / f"{plot.name}.png")
    write_text(out / "report.md", reporting.report(parts, sections))
    if "steps" in parts:
        write_text(out / "steps.json", json.dumps(steps.for_choosing(parts["steps"]), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
