"""Evaluation: bounds on the log-likelihood of a split. May import torch, models and data; draws only from its own generator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dgrad.data import Split, unit
from dgrad.networks import DiscreteVAE

EXACT_SUPPORT = 256
"""Up to this many codes the expectation is a sum over all of them, not a mean over samples."""
CODES_AT_ONCE = 8192


@dataclass(frozen=True)
class Bound:
    """The negative evidence bound of a split, the mean over its images, in the likelihood's unit (nats).

    Attributes:
        bound: `E_q[-log p(x | z)] + KL(q || p)`.
        reconstruction: the first term.
        kl: the second.
        standard_error: of `bound`, from drawing codes; 0 where the expectation is exact, nan with a single sample.
    """

    bound: float
    reconstruction: float
    kl: float
    standard_error: float


def evaluation_generator(device: torch.device, seed: int) -> Generator:
    """A fresh generator for one evaluation: every evaluation of a run draws the same noise, and none of the training's."""
    return Generator(device).manual_seed(seed + 2**40)


@torch.no_grad()
def evaluate_bound(model: DiscreteVAE, split: Split, *, samples: int, generator: Generator) -> Bound:
    """The bound of a split; exact where the support has at most 256 codes, else from `samples` codes for each image."""
    exact = model.layer.support_size <= EXACT_SUPPORT
    totals = torch.zeros(3, dtype=torch.float64, device=generator.device if generator.device.type != "mps" else "cpu")
    for images, logits in _encoded(model, split, model.layer.support_size if exact else samples):
        objective = model.reconstruction(images)
        if exact:
            support = model.layer.enumerate(like=logits).unsqueeze(1)  # [K, 1, *code]
            weights = model.layer.log_prob(logits, support).exp()  # [K, B]
            reconstruction = (weights * objective(support)).sum(0)  # [B]
            variance = torch.zeros_like(reconstruction)
        else:
            losses = objective(model.layer.sample(logits, samples, generator=generator))  # [S, B]
            reconstruction = losses.mean(0)  # [B]
            variance = losses.var(0) / samples if samples > 1 else torch.full_like(reconstruction, math.nan)
        sums = torch.stack([reconstruction.sum(), model.layer.kl(logits).sum(), variance.sum()])
        totals += sums.to(totals.device, totals.dtype)
    reconstruction_sum, kl_sum, variance_sum = totals.tolist()
    count = len(split)
    return Bound(
        bound=(reconstruction_sum + kl_sum) / count,
        reconstruction=reconstruction_sum / count,
        kl=kl_sum / count,
        standard_error=math.sqrt(variance_sum) / count,
    )


@torch.no_grad()
def importance_weighted_bound(model: DiscreteVAE, split: Split, *, samples: int, generator: Generator) -> float:
    """The importance-weighted bound on `-log p(x)`, the mean over the split (Burda, Grosse & Salakhutdinov 2015).

    `-log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x)`; it falls towards `-log p(x)` as S grows.
    """
    total = 0.0
    for images, logits in _encoded(model, split, min(samples, 100)):
        objective = model.reconstruction(images)
        log_mean = torch.full((len(images),), -math.inf, dtype=logits.dtype, device=logits.device)
        for start in range(0, samples, 100):
            codes = model.layer.sample(logits, min(100, samples - start), generator=generator)  # [s, B, *code]
            log_weights = model.layer.log_prior - objective(codes) - model.layer.log_prob(logits, codes)
            log_mean = torch.logaddexp(log_mean, log_weights.logsumexp(0))
        total += float((math.log(samples) - log_mean).sum())
    return total / len(split)


def _encoded(model: DiscreteVAE, split: Split, codes_per_image: int) -> Iterator[tuple[Tensor, Tensor]]:
    model.eval()
    for images in split.images.split(max(1, min(1000, CODES_AT_ONCE // codes_per_image))):
        images = unit(images)
        yield images, model.encoder(images)
    model.train()
