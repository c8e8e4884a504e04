"""Divides by the naive algorithm: every changed code through the whole decoder, written in plain torch with nothing of dgrad.

    python -m benchmarks.naive --data-root DIR

Steps of the naive `direct` and of ours take turns; the ratio of their medians is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgrad.config import COMPILE_MODES, configure
from dgrad.training import Trainer

WARM_UP = 5
EPSILON = 0.1


def naive_sweep(decoder: nn.Module, codes: Tensor, images: Tensor) -> Tensor:
    """The loss `[B, n, k]` of `codes` `[B, n, k]` with row i replaced by `onehot(j)`, each by a whole evaluation of the decoder."""
    batch, n, k = codes.shape
    changed = codes[:, None, None].repeat(1, n, k, 1, 1)  # [B, n, k, n, k]
    for row in range(n):
        changed[:, row, :, row] = torch.eye(k)
    outputs = decoder(changed.view(batch * n * k, n * k)).view(batch, n, k, -1)
    return F.binary_cross_entropy_with_logits(outputs, images[:, None, None].expand_as(outputs), reduction="none").sum(
        -1
    )


def naive_step(
    encoder: nn.Module, decoder: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, n: int
) -> None:
    """A step of direct optimization through argmax: the gradient `(z(phi + G) - z(phi + G - eps f)) / eps`, and the decoder's own."""
    logits = encoder(images).view(len(images), n, -1)  # [B, n, k]
    k = logits.shape[-1]
    with torch.no_grad():
        potentials = logits - torch.empty_like(logits).exponential_().log()
        codes = F.one_hot(potentials.argmax(-1), k).float()
        losses = naive_sweep(decoder, codes, images)
        perturbed = F.one_hot((potentials - EPSILON * losses).argmax(-1), k).float()
    reconstruction = F.binary_cross_entropy_with_logits(decoder(codes.flatten(1)), images, reduction="none").sum(-1)
    loss = (reconstruction + (logits * (codes - perturbed)).sum((1, 2)) / EPSILON).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def milliseconds(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """The times of steps that take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="where MNIST is")
    parser.add_argument("--latents", nargs="+", default=["20x10", "20x2", "1x40"])
    parser.add_argument("--estimators", nargs="+", default=["gumbel-softmax", "direct", "direct-rb", "leg"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", default="on", choices=COMPILE_MODES)
    arguments = parser.parse_args()
    print(f"milliseconds of a training step, medians, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for latent in arguments.latents:
        settings = {"latent": latent, "dataset": "mnist", "data-root": arguments.data_root, "device": "cpu"}
        trainers = {
            name: Trainer(configure({**settings, "estimator": name, "compile": arguments.compile, "epochs": 1000}))
            for name in arguments.estimators
        }
        n, k = map(int, latent.split("x"))
        images = next(next(iter(trainers.values())).batches).images.flatten(1)
        encoder, decoder = nn.Linear(images.shape[1], n * k), nn.Linear(n * k, images.shape[1])
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)

        def naive(
            encoder: nn.Module = encoder,
            decoder: nn.Module = decoder,
            optimizer: torch.optim.Optimizer = optimizer,
            images: Tensor = images,
            n: int = n,
        ) -> None:
            naive_step(encoder, decoder, optimizer, images, n)

        times = milliseconds(
            {"naive": naive, **{name: trainer.train_step for name, trainer in trainers.items()}}, arguments.rounds
        )
        median = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{latent:<20}{'median ms':>10}{'naive / this':>14}{'quartiles, ms':>18}")
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            print(f"{name:<20}{median[name]:>10.2f}{median['naive'] / median[name]:>14.1f}{low:>10.2f}{high:>8.2f}")


if __name__ == "__main__":
    main()
