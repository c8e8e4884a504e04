"""FSQ, VQ and ours on 7x7 codes of 512 values: `python -m benchmarks.codebooks --data-root DIR --out DIR`.

A convolutional autoencoder of MNIST in grey, the same but for the bottleneck. Every method gets the same seconds of
CPU time. Its settings are chosen by the validation error of shorter runs. Finished runs are kept in `--out`. With
`--steps` it prints the time of a step instead, with one-hot products and with lookups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import dgrad
from dgrad.data import load_dataset, unit
from dgrad.kernels.lookup import lookup
from dgrad.registry import datasets

SIDE, VALUES, WIDTH, BATCH = 7, 512, 64, 32
LEVELS = (8, 8, 8)
CHOOSING, FINAL, SEEDS = 20.0, 30.0, 2
"""CPU seconds of a run that chooses settings and of one that counts, and how many seeds the latter have."""
LAYER = f"{SIDE * SIDE}x{VALUES}"

Settings = dict[str, Any]
GRID: dict[str, list[Settings]] = {
    "fsq": [{"rate": rate} for rate in (0.0005, 0.001, 0.002, 0.004)],
    "vq-ema": [
        {"rate": rate, "commitment_weight": weight, "decay": decay}
        for rate in (0.001, 0.003)
        for weight, decay in ((0.25, 0.99), (1.0, 0.8))
    ]
    + [{"rate": 0.01, "commitment_weight": 0.25, "decay": 0.99}],
    "st-gumbel-softmax": [
        {"rate": 0.001, "temperature": 0.5},
        {"rate": 0.001, "temperature": 1.0},
        {"rate": 0.003, "temperature": 0.5},
        {"rate": 0.003, "temperature": 1.0, "kl": 0.01},
        {"rate": 0.01, "temperature": 1.0, "kl": 0.01},
        {"rate": 0.01, "temperature": 1.0, "kl": 0.03},
        {"rate": 0.01, "temperature": 1.0, "kl": 0.1},
    ],
    "direct-linear": [
        {"rate": 0.003, "epsilon": 1.0, "kl": 0.01},
        {"rate": 0.01, "epsilon": 1.0, "kl": 0.01},
        {"rate": 0.01, "epsilon": 0.1, "kl": 0.03},
        {"rate": 0.01, "epsilon": 0.01, "kl": 0.03},
    ],
    "rloo": [{"rate": 0.001, "samples": 4}, {"rate": 0.003, "samples": 4, "kl": 0.01}],
}
"""The settings that are tried. The weight of the KL to the uniform distribution falls to 0 as the rate does."""


class Quantised(nn.Module):
    """A bottleneck of another library: features `[B, 7, 7, width]` to features, a loss and indices `[B, 7, 7]`."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__()
        from vector_quantize_pytorch import FSQ, VectorQuantize

        self.fsq = name == "fsq"
        self.width = len(LEVELS) if self.fsq else WIDTH
        self.quantiser = (
            FSQ(list(LEVELS))
            if self.fsq
            else VectorQuantize(
                WIDTH,
                VALUES,
                decay=settings["decay"],
                commitment_weight=settings["commitment_weight"],
                kmeans_init=True,
                threshold_ema_dead_code=2,
            )
        )
        self.rise = nn.Linear(self.width, WIDTH)

    def forward(self, features: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        result = self.quantiser(features.flatten(1, 2))
        total = loss(self.rise(result[0]).unsqueeze(0)).mean()
        return (total if self.fsq else total + result[2].sum()), result[1]


class Latent(nn.Module):
    """Ours: features are logits, and a table holds a vector for each value."""

    def __init__(self, name: str, settings: Settings, *, by_lookup: bool = True) -> None:
        super().__init__()
        self.width = VALUES
        self.layer = dgrad.latent(LAYER)
        given = {key: value for key, value in settings.items() if key not in ("rate", "kl")}
        self.estimator = dgrad.estimator(name, **given)
        self.by_lookup = by_lookup
        self.kl_weight = 0.0
        self.table = nn.Parameter(torch.randn(VALUES, WIDTH))

    def forward(self, features: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits = features.flatten(1, 2)  # [B, 49, 512]
        indices = logits.argmax(-1)
        if not self.training:
            return loss(self.table[indices].unsqueeze(0)).mean(), indices
        total = self.estimator(self.layer, logits, lambda codes: loss(self.vectors(codes))).loss.mean()
        return (total + self.kl_weight * self.layer.kl(logits).mean() if self.kl_weight else total), indices

    def vectors(self, codes: Tensor) -> Tensor:
        """A vector for each position, `[S, B, 49, width]`."""
        return lookup(codes, self.table) if self.by_lookup else codes @ self.table


class Autoencoder(nn.Module):
    """Two strided convolutions each way, and a bottleneck between them."""

    def __init__(self, name: str, settings: Settings, **options: Any) -> None:
        super().__init__()
        ours = name not in ("fsq", "vq-ema")
        self.bottleneck: Any = Latent(name, settings, **options) if ours else Quantised(name, settings)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, WIDTH, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.SiLU(), nn.Conv2d(WIDTH, self.bottleneck.width, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(WIDTH, 32, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over images of what is trained, and the code `[B, 49]`."""

        def loss(vectors: Tensor) -> Tensor:  # [S, B, 49, width] -> [S, B]
            maps = vectors.flatten(0, 1).mT.unflatten(-1, (SIDE, SIDE))
            outputs = self.decoder(maps).unflatten(0, vectors.shape[:2])
            return (outputs - images).square().flatten(2).sum(-1)

        total, indices = self.bottleneck(self.encoder(images).movedim(1, -1), loss)
        return total, indices.flatten(1)


def batches(images: Tensor, generator: Generator) -> Iterator[Tensor]:
    """Batches of shuffled epochs without end."""
    while True:
        for order in torch.randperm(len(images), generator=generator).split(BATCH)[:-1]:
            yield unit(images[order])


def train(name: str, settings: Settings, images: Tensor, seconds: float, seed: int) -> tuple[Autoencoder, int]:
    """A model after so much CPU time. The rate falls along a cosine of the time that is spent."""
    torch.manual_seed(seed)
    model = Autoencoder(name, settings)
    optimizer = torch.optim.Adam(model.parameters(), settings["rate"], fused=True)
    schedule = getattr(getattr(model.bottleneck, "estimator", None), "set_step", None)
    if schedule is not None:
        model.bottleneck.estimator.set_run_length(1000)
    steps, start = 0, time.process_time()
    for batch in batches(images, Generator().manual_seed(seed)):
        spent = (time.process_time() - start) / seconds
        if spent >= 1:
            break
        share = (1 + math.cos(math.pi * spent)) / 2
        optimizer.param_groups[0]["lr"] = settings["rate"] * share
        model.bottleneck.kl_weight = settings.get("kl", 0.0) * share
        if schedule is not None:
            schedule(int(1000 * spent))
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return model, steps


@torch.no_grad()
def evaluate(model: Autoencoder, images: Tensor) -> dict[str, float]:
    """Squared error of an image, its PSNR, the entropy of the values in bits for a position, and how many are in use.

    The code of an image is decided, not drawn.
    """
    model.eval()
    error, counts = 0.0, torch.zeros(VALUES, dtype=torch.float64)
    for batch in images.split(500):
        loss, indices = model(unit(batch))
        error += float(loss) * len(batch) / len(images)
        counts += torch.bincount(indices.flatten(), minlength=VALUES)
    shares = counts / counts.sum()
    entropy = float(-torch.xlogy(shares, shares).sum() / math.log(2))
    psnr = -10 * math.log10(error / images[0].numel())
    return {"error": error, "psnr": psnr, "bits": entropy, "used": int((counts > 0).sum())}


def measured(name: str, settings: Settings, data: Any, seconds: float, seed: int, out: Path) -> dict[str, Any]:
    """The figures of one run, from the file of an earlier run where there is one."""
    text = "-".join(f"{key}={value}" for key, value in settings.items()).replace(":", "_")
    file = out / f"{name}-{text}-{seconds:g}s-seed{seed}.json"
    if not file.exists():
        model, steps = train(name, settings, data.train.images, seconds, seed)
        split = data.valid if seconds == CHOOSING else data.test
        figures = {"name": name, "settings": settings, "steps": steps, **evaluate(model, split.images)}
        file.write_text(json.dumps(figures), encoding="utf-8")
        print(json.dumps(figures), flush=True)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def steps(images: Tensor, rounds: int = 30) -> None:
    """Print the median CPU milliseconds of a training step: with one-hot products, and with lookups."""
    cases: dict[str, Autoencoder] = {}
    for name, grid in GRID.items():
        for by_lookup in (False, True):
            options = {} if name in ("fsq", "vq-ema") else {"by_lookup": by_lookup}
            case = f"{name} by lookup" if options and by_lookup else name
            cases.setdefault(case, Autoencoder(name, grid[0], **options))
    times: dict[str, list[float]] = {case: [] for case in cases}
    source = batches(images, Generator().manual_seed(0))
    for batch, (case, model) in itertools.product(itertools.islice(source, rounds), cases.items()):
        start = time.process_time()
        model(batch)[0].backward()
        times[case].append(1000 * (time.process_time() - start))
    for case, each in times.items():
        print(f"{case:32} {statistics.median(each[3:]):8.1f} ms")


def main() -> None:
    """Choose settings, measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(GRID))
    parser.add_argument("--seconds", type=float, default=FINAL, help="CPU time of a run that counts")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", action="store_true", help="time steps instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("mnist", arguments.data_root, datasets())
    if arguments.steps:
        steps(data.train.images)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    best = {}
    for name in arguments.methods.split(","):
        grid = GRID[name]
        tried = [measured(name, settings, data, CHOOSING, 0, arguments.out) for settings in grid]
        best[name] = min(tried, key=lambda each: each["error"])["settings"]
    by_seed = [
        [measured(name, settings, data, arguments.seconds, seed, arguments.out) for name, settings in best.items()]
        for seed in range(1, arguments.seeds + 1)
    ]
    rows = list(zip(*by_seed, strict=True))
    print("| bottleneck | settings | steps | squared error | PSNR | bits a position | values in use |")
    print("|---|---|---|---|---|---|---|")
    for runs in sorted(rows, key=lambda runs: sum(run["error"] for run in runs)):
        mean = {key: statistics.fmean(run[key] for run in runs) for key in ("steps", "error", "psnr", "bits", "used")}
        given = " ".join(f"{key}={value}" for key, value in runs[0]["settings"].items())
        print(
            f"| `{runs[0]['name']}` | {given} | {mean['steps']:.0f} | {mean['error']:.2f} | {mean['psnr']:.2f} | "
            f"{mean['bits']:.2f} | {mean['used']:.0f} |"
        )


if __name__ == "__main__":
    main()
