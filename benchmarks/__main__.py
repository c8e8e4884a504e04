"""Times a whole training step of every estimator, as a ratio to Gumbel-softmax's in the same run.

    python -m benchmarks --data-root DIR --out results

Steps of all estimators take turns, so that a machine whose speed drifts slows all of them alike. Ratios can be compared
between machines; milliseconds cannot.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dgrad
from dgrad.config import COMPILE_MODES, configure
from dgrad.devices import choose_device, describe_device
from dgrad.training import Trainer

REFERENCE = "gumbel-softmax"
LATENTS = ["20x10", "20x2", "1x40"]
WARM_UP = 20


def step_times(
    latent: str, settings: dict[str, Any], estimators: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step: least, median, and their ratios to the reference's, for each estimator that fits the latent."""
    layer = dgrad.latent(latent)
    names = [name for name in estimators if dgrad.estimator(name).traits.supports(layer)]
    trainers = {
        name: Trainer(configure({**settings, "estimator": name, "latent": latent, "epochs": 1000})) for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + rounds):
        for name, trainer in trainers.items():
            _wait(trainer.device)
            start = time.perf_counter()
            trainer.train_step()
            _wait(trainer.device)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    least = {name: min(values) for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "least_ms": least[name],
            "median_ms": median[name],
            "least_ratio": least[name] / least[REFERENCE],
            "median_ratio": median[name] / median[REFERENCE],
        }
        for name in names
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _invented_images(directory: str) -> str:
    """MNIST-sized binary images, a fifth of their pixels set, where there is no MNIST."""
    path = Path(directory) / "invented.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=(rng.random((2000, 28, 28)) < 0.2).astype(np.uint8) * np.uint8(255))
    return str(path)


def main() -> None:
    """Measure, print a table, and write `steps.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="where MNIST is; images of the same size are invented without it")
    parser.add_argument("--latents", nargs="+", default=LATENTS)
    parser.add_argument("--estimators", nargs="+", default=sorted(dgrad.estimators()))
    parser.add_argument("--rounds", type=int, default=100, help="measured steps of each estimator")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", default="on", choices=COMPILE_MODES, help="compiled kernels (default: on)")
    parser.add_argument("--out", type=Path, help="a directory for steps.json")
    arguments = parser.parse_args()
    estimators = sorted({REFERENCE, *arguments.estimators})
    with tempfile.TemporaryDirectory() as directory:
        data = (
            {"dataset": "mnist", "data-root": arguments.data_root}
            if arguments.data_root
            else {"dataset": _invented_images(directory)}
        )
        settings = {**data, "device": arguments.device, "compile": arguments.compile}
        results = {latent: step_times(latent, settings, estimators, arguments.rounds) for latent in arguments.latents}
    report = {
        "device": describe_device(choose_device(arguments.device)),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dgrad": dgrad.__version__,
        "data": "mnist" if arguments.data_root else "invented",
        "compile": arguments.compile,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "steps": results,
    }
    print(
        f"whole training step, linear networks, batch 100, {report['data']} images, {report['device']}, torch {report['torch']}"
    )
    for latent, rows in results.items():
        print(f"\n{latent:<20}{'least ms':>10}{'median ms':>11}{'ratio of least':>16}{'of medians':>12}")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["median_ms"]):
            print(
                f"{name:<20}{row['least_ms']:>10.2f}{row['median_ms']:>11.2f}{row['least_ratio']:>16.2f}{row['median_ratio']:>12.2f}"
            )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "steps.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
