"""Divides by the naive algorithm: every changed code through the whole decoder, in plain torch without dgrad.

Steps of the naive `direct` and of ours take turns; the ratio of their medians is what counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgrad
from benchmarks.measuring import compared, take_turns
from benchmarks.reporting import Bars, Table, milliseconds, ratio
from benchmarks.settings import Settings
from dgrad.training.trainer import Trainer

ABOUT = (
    "The naive `direct` puts every changed code through the whole decoder, in plain torch. Linear networks, batch 100."
)
EPSILON = 0.1
NAIVE = "naive"
ESTIMATORS = ("gumbel-softmax", "direct", "direct-rb", "leg")


def naive_sweep(decoder: nn.Module, codes: Tensor, images: Tensor) -> Tensor:
    """The loss `[B, n, k]` of `codes` `[B, n, k]` with row i replaced by `onehot(j)`, by whole evaluations."""
    batch, n, k = codes.shape
    changed = codes[:, None, None].repeat(1, n, k, 1, 1)  # [B, n, k, n, k]
    for row in range(n):
        changed[:, row, :, row] = torch.eye(k, device=codes.device)
    outputs = decoder(changed.view(batch * n * k, n * k)).view(batch, n, k, -1)
    truth = images[:, None, None].expand_as(outputs)
    return F.binary_cross_entropy_with_logits(outputs, truth, reduction="none").sum(-1)


def naive_step(
    encoder: nn.Module, decoder: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, n: int
) -> None:
    """A step with the gradient `(z(phi + G) - z(phi + G - eps f)) / eps` for the logits, and the decoder's own."""
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


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step by latent, of the naive one and of some estimators: `{latent: {name: ...}}`."""
    return {latent: _steps(settings, latent) for latent in settings.latents}


def _steps(settings: Settings, latent: str) -> dict[str, dict[str, Any]]:
    trainers = {
        name: Trainer(settings.training(name, latent, epochs=1000)) for name in settings.estimators or ESTIMATORS
    }
    n, k = dgrad.latent(latent).shape
    images = next(next(iter(trainers.values())).batches).images.flatten(1)
    encoder, decoder = nn.Linear(images.shape[1], n * k), nn.Linear(n * k, images.shape[1])
    encoder, decoder = encoder.to(images.device), decoder.to(images.device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    actions = {
        NAIVE: lambda: naive_step(encoder, decoder, optimizer, images, n),
        **{name: trainer.train_step for name, trainer in trainers.items()},
    }
    warm_up = 1 if settings.quick else 5
    return compared(take_turns(actions, settings.rounds_or(20), settings.device, warm_up=warm_up), NAIVE)


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each latent."""
    return [
        Table(
            latent,
            ["step", "median, ms", "quartiles, ms", "naive / this"],
            [[name, *milliseconds(row), ratio(row, NAIVE, inverse=True)] for name, row in rows.items()],
        )
        for latent, rows in figures.items()
    ]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """How many of our steps take as long as a naive one."""
    shares = {
        latent: {name: 1 / row["ratios"][NAIVE] for name, row in rows.items() if name != NAIVE}
        for latent, rows in figures.items()
    }
    return [Bars("naive", "training step, linear networks: the naive direct's median / this", shares)]
