"""Control variates for leave-one-out at a trained run: `python -m benchmarks.control_variates RUN`. Prints two tables.

The first sets `rloo` beside `direct-unbiased` at equal numbers of samples. The second has what was tried on the
way: the sampled difference of direct optimization on a linear surrogate, and a linear surrogate of slopes through
the score function. Total variance of the logits' gradient, the mean over 20 validation images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.estimator_tools import sweep_evaluations
from dgrad.data import unit
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.vae.model import DiscreteVAE

IMAGES, DRAWS, AT_ONCE, SAMPLES = 20, 2000, 200, 4


def total_variance(draw: Callable[[], Tensor]) -> float:
    """Of draws `[d, B, n, k]`: summed over coordinates, averaged over images."""
    draws = torch.cat([draw() for _ in range(DRAWS // AT_ONCE)])
    return float(draws.var(0).sum((-2, -1)).mean())


def estimator_variance(model: DiscreteVAE, images: Tensor, name: str, **hyperparameters: float) -> float:
    """The total variance of a registered estimator."""
    estimator, generator = dgrad.estimator(name, **hyperparameters), Generator().manual_seed(0)
    logits = model.encoder(images).detach()
    at_once = max(1, 400 // int(hyperparameters["samples"]))
    objective = model.reconstruction(images.repeat(at_once, 1, 1, 1))
    gradients = []
    for _ in range(max(2, DRAWS // at_once)):
        leaf = logits.repeat(at_once, 1, 1).requires_grad_()
        loss = estimator(model.layer, leaf, objective, generator=generator).loss.sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0].unflatten(0, (at_once, -1)))
    return float(torch.cat(gradients).var(0).sum((-2, -1)).mean())


class Tried:
    """Draws of `rloo` with 4 samples beside the control variates that were tried, from the same samples."""

    def __init__(self, model: DiscreteVAE, images: Tensor) -> None:
        self.layer, self.objective = model.layer, model.reconstruction(images)
        self.logits = model.encoder(images).detach()
        self.p = self.layer.mean(self.logits)
        with torch.no_grad():
            sweep = self.objective.sweep(self.layer.sample(self.logits, 200)).mean(0)
        self.best_linear = sweep - (self.p * sweep).sum(-1, keepdim=True)  # E[f | row i has value j] - E[f], estimated

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Perturbed logits, scores, losses, and the mean slope of the other samples; `[d, S, B, ...]`."""
        potentials = self.logits + self.layer.noise(self.logits, AT_ONCE * SAMPLES)
        codes = self.layer.argmax(potentials)
        at = self.objective.at(codes, differentiable=True)
        potentials, codes, loss, slope = (
            tensor.unflatten(0, (AT_ONCE, SAMPLES)) for tensor in (potentials, codes, at.loss.detach(), at.slope())
        )
        others = (slope.sum(1, keepdim=True) - slope) / (SAMPLES - 1)
        return potentials, codes - self.p, loss, others

    def through_the_score(self, coefficient: float) -> Tensor:
        """`rloo` on `f - a c . s`, plus `a J(p) c`; c is the others' mean slope."""
        _, score, loss, c = self.samples()
        # The baseline of sample m: the others' losses less the same surrogate, c_m, at their codes.
        left = loss.unsqueeze(1) - coefficient * torch.einsum("dmbnk,djbnk->dmjb", c, score)  # [d, m, j, B]
        own = left.diagonal(dim1=1, dim2=2).movedim(-1, 1)
        advantage = own - (left.sum(2) - own) / (SAMPLES - 1)
        mean = self.p * (c - (self.p * c).sum(-1, keepdim=True))
        return (advantage[..., None, None] * score + coefficient * mean).mean(1)

    def sampled_difference(self, epsilon: float, *, best_surrogate: bool) -> tuple[float, float]:
        """The variance of `rloo`, and the share of it that the difference takes off with the best coefficient."""
        plain, differences = [], []
        for _ in range(DRAWS // AT_ONCE):
            potentials, score, loss, slopes = self.samples()
            advantage = (loss - loss.mean(1, keepdim=True)) * SAMPLES / (SAMPLES - 1)
            plain.append((advantage[..., None, None] * score).mean(1))
            c = self.best_linear if best_surrogate else slopes
            drawn = (self.layer.argmax(potentials) - self.layer.argmax(potentials - epsilon * c)) / epsilon
            mean = (self.p - self.layer.mean(self.logits - epsilon * c)) / epsilon
            differences.append((drawn - mean).mean(1))
        rloo, difference = torch.cat(plain), torch.cat(differences)
        eta = (rloo * difference).sum() / difference.square().sum()
        before, after = (each.var(0).sum((-2, -1)).mean() for each in (rloo, rloo - eta * difference))
        return float(before), float(1 - after / before)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a trained run")
    run = Run.open(parser.parse_args().run)
    torch.manual_seed(0)
    model, _ = load_model(run, "last")
    data = Build(run.config).evaluation_data
    images = unit(data.valid.images[:IMAGES])
    print(f"{run.path}: latent {model.layer}")
    print(f"{'samples':>8} {'rloo':>9} {'direct-unbiased':>16} {'ratio':>6}")
    sweep = sweep_evaluations(model.layer)
    for samples in sorted({2, 4, 8, 16, 32, 64, sweep}):
        rloo, ours = (estimator_variance(model, images, name, samples=samples) for name in ("rloo", "direct-unbiased"))
        print(f"{samples:8d} {rloo:9.3f} {ours:16.3f} {ours / rloo:6.2f}", flush=True)
    print(f"leg, {sweep} evaluations: {estimator_variance(model, images, 'leg', samples=1):.3f}")
    tried = Tried(model, images)
    print(f"\nwith {SAMPLES} samples")
    for coefficient in (0.0, 0.1, 0.3, 1.0):
        variance = total_variance(lambda coefficient=coefficient: tried.through_the_score(coefficient))  # type: ignore[misc]
        print(f"slopes through the score function, coefficient {coefficient:g}: {variance:.2f}", flush=True)
    for best_surrogate in (True, False):
        for epsilon in (0.01, 0.1, 1.0, 10.0):
            before, share = tried.sampled_difference(epsilon, best_surrogate=best_surrogate)
            surrogate = "the best linear surrogate" if best_surrogate else "slopes"
            print(f"sampled difference on {surrogate}, epsilon {epsilon:g}: {before:.2f} less {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
