"""Evaluation: bounds on the log-likelihood of a split. It draws from its own generator alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Objective
from dgrad.core.random import seed_for
from dgrad.core.refinement import refine
from dgrad.data import Split, unit
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.posterior import Posterior

EXACT_SUPPORT = 256
"""Up to this many codes the expectation is a sum over all of them, not a mean over samples."""
EXACT_NUMBERS = 2**22
"""Unless the decoder would compute more numbers than that for all of them, for one image."""
CODES_AT_ONCE = 8192
NUMBERS_AT_ONCE = 2**26
"""For that many codes, or fewer where the decoder computes many numbers for one: 256 MiB."""


@dataclass(frozen=True)
class Bound:
    """The negative evidence bound of a split, the mean over its images, in the likelihood's unit (nats).

    Attributes:
        bound: `E_q[-log p(x | z)] + KL(q || p)`, with Gaussian variables in both where there are some.
        reconstruction: the first term.
        kl: the second, of the code.
        standard_error: of `bound`, from drawing codes; 0 where the expectation is exact, nan with a single sample.
        gaussian_kl: that of the Gaussian variables, part of `bound` too; None for a model without them.
    """

    bound: float
    reconstruction: float
    kl: float
    standard_error: float
    gaussian_kl: float | None = None


def evaluation_generator(device: torch.device, seed: int) -> Generator:
    """A fresh generator for one evaluation: every evaluation of a run draws the same noise."""
    return Generator(device).manual_seed(seed_for("evaluation", seed))


@torch.no_grad()
def evaluate_accuracies(model: DiscreteVAE, split: Split, attributes: Sequence[str] = ()) -> dict[str, float]:
    """The share of a split's labels that are the most probable values of the code's variables, in [0, 1].

    Returns:
        `accuracy`. With attributes also `accuracy_NAME` of each, of which it is the mean.
    """
    assert split.labels is not None
    values = [posterior.logits.argmax(-1) for _, posterior in _encoded(model, split, 1)]  # [B, n] each
    right = torch.cat(values) == split.labels.reshape(len(split), -1)
    accuracies = [count / len(split) for count in right.sum(0).tolist()]
    named = zip(attributes, accuracies, strict=True) if attributes else ()
    return {"accuracy": sum(accuracies) / len(accuracies), **{f"accuracy_{name}": value for name, value in named}}


@contextmanager
def evaluating(model: DiscreteVAE) -> Iterator[None]:
    """The model without what its networks do in training only, such as dropout; afterwards it is as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate_bound(
    model: DiscreteVAE, split: Split, *, samples: int, generator: Generator, refine_steps: int = 0
) -> Bound:
    """The bound of a split, from `samples` draws for each image.

    Over a support of at most 256 codes the expectation is exact, unless the decoder is so large that this would take
    long. Then only Gaussian variables are drawn, where there are some.

    Args:
        refine_steps: how many steps q is refined for each image (`dgrad.core.refinement.refine`). With Gaussian
            variables q is refined for each draw of them: q of the code depends on them, and its KL is the mean over the
            draws.
    """
    support = model.layer.support_size
    exact = support <= EXACT_SUPPORT and support * model.numbers_per_code <= EXACT_NUMBERS
    totals = torch.zeros(4, dtype=torch.float64, device=generator.device if generator.device.type != "mps" else "cpu")
    for images, posterior in _encoded(model, split, support if exact else samples):
        losses, kl = _losses_and_kl(model, images, posterior, samples, exact, refine_steps, generator)
        if exact and not model.gaussian:
            variance = torch.zeros_like(losses[0])
        else:
            variance = (losses + kl).var(0) / samples if samples > 1 else torch.full_like(losses[0], math.nan)
        gaussian_kl = torch.zeros_like(losses[0]) if posterior.gaussian is None else posterior.gaussian.kl()
        sums = torch.stack([losses.mean(0).sum(), kl.mean(0).sum(), gaussian_kl.sum(), variance.sum()])
        totals += sums.to(totals.device, totals.dtype)
    count = len(split)
    reconstruction_mean, kl_mean, gaussian_kl_mean = (totals[:3] / count).tolist()
    return Bound(
        bound=reconstruction_mean + kl_mean + gaussian_kl_mean,
        reconstruction=reconstruction_mean,
        kl=kl_mean,
        standard_error=math.sqrt(float(totals[3])) / count,
        gaussian_kl=gaussian_kl_mean if model.gaussian else None,
    )


def _expected_loss(layer: LatentLayer, logits: Tensor, objective: Objective) -> Tensor:
    """`E_q[f(z)]`, `[B]`, summed over all codes."""
    support = layer.enumerate(like=logits)  # [K, *code]
    losses = objective.everywhere(support, len(logits))  # [K, B]
    return (layer.log_prob(logits, support.unsqueeze(1)).exp() * losses).sum(0)


def _losses_and_kl(
    model: DiscreteVAE,
    images: Tensor,
    posterior: Posterior,
    samples: int,
    exact: bool,
    refine_steps: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Estimates of each image's expected loss, `[S, B]`, and the KL of its code.

    The KL is `[S, B]`, or `[1, B]` where every estimate is of the same q. Estimates are of draws of the code, of the
    Gaussian variables, or of both; S is 1 where nothing is drawn.
    """
    layer = model.layer
    if not model.gaussian:
        objective = model.reconstruction(images)
        logits = refine(layer, posterior.logits, objective, refine_steps, generator=generator)
        if exact:
            losses = _expected_loss(layer, logits, objective).unsqueeze(0)
        else:
            losses = objective(layer.sample(logits, samples, generator=generator))
        return losses, layer.kl(logits).unsqueeze(0)
    of_draws = []
    for _ in range(samples):
        objective = model.reconstruction(images, posterior.draw(generator=generator))
        logits = refine(layer, posterior.logits, objective, refine_steps, generator=generator)
        if exact:
            loss = _expected_loss(layer, logits, objective)
        else:
            loss = objective(layer.sample(logits, generator=generator)).squeeze(0)
        of_draws.append(torch.stack([loss, layer.kl(logits)]))
    losses, kl = torch.stack(of_draws, 1)
    return losses, kl


@torch.no_grad()
def importance_weighted_bound(
    model: DiscreteVAE, split: Split, *, samples: int, generator: Generator, refine_steps: int = 0
) -> float:
    """The importance-weighted bound on `-log p(x)`, the mean over the split (Burda, Grosse & Salakhutdinov 2015).

    `-log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x)` falls towards `-log p(x)` as S grows. Gaussian variables are drawn
    with z. With `refine_steps` q is refined first, as in `evaluate_bound`.
    """
    total = 0.0
    at_once = 1 if model.gaussian else 100
    for images, posterior in _encoded(model, split, min(samples, at_once)):
        encoded = posterior.logits
        log_mean = torch.full((len(images),), -math.inf, dtype=encoded.dtype, device=encoded.device)
        for start in range(0, samples, at_once):
            gaussian = posterior.draw(generator=generator)
            objective = model.reconstruction(images, gaussian)
            if start == 0 or model.gaussian:
                logits = refine(model.layer, encoded, objective, refine_steps, generator=generator)
            codes = model.layer.sample(logits, min(at_once, samples - start), generator=generator)  # [s, B, *code]
            log_weights = model.layer.log_prior - objective(codes) - model.layer.log_prob(logits, codes)
            if posterior.gaussian is not None and gaussian is not None:
                log_weights = log_weights - posterior.gaussian.log_ratio(gaussian)
            log_mean = torch.logaddexp(log_mean, log_weights.logsumexp(0))
        total += float((math.log(samples) - log_mean).sum())
    return total / len(split)


def _encoded(model: DiscreteVAE, split: Split, codes_per_image: int) -> Iterator[tuple[Tensor, Posterior]]:
    with evaluating(model):
        codes_at_once = min(CODES_AT_ONCE, NUMBERS_AT_ONCE // model.numbers_per_code)
        for images in split.images.split(max(1, min(1000, codes_at_once // codes_per_image))):
            images = unit(images)
            yield images, model.posterior(images)
