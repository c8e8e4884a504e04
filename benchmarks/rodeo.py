"""RODEO beside its paper's network, written out: `python -m benchmarks.rodeo`. Prints a table.

Shi, Zhou, Hwang, Titsias & Mackey 2022, with the settings of their code for two samples: a network of 100 units with
leaky ReLU, its inputs the other sample's loss and the linear prediction from it, coefficients alpha and beta that start
at 0, Adam with rate 0.001 on the squared gradient. Theirs is for binary variables. Small problems, all samples drawn
anew at each step; after training the variance is measured with what was learned held.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgrad
from dgrad.testing import small_logits, small_objectives

BATCH, RATE = 50, 0.001
OBJECTIVES = ("smooth", "cross-entropy", "spiky")


class Published(nn.Module):
    """The paper's estimator for bits with two samples: the gradient for the log-odds of each, `[B, n]`."""

    def __init__(self) -> None:
        super().__init__()
        self.of_prediction, self.of_loss, self.outputs = nn.Linear(1, 100), nn.Linear(1, 100), nn.Linear(100, 2)
        for layer in (self.of_prediction, self.of_loss, self.outputs):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.alpha, self.beta = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def surrogates(self, loss: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Two numbers for each prediction."""
        hidden = self.of_prediction(prediction.unsqueeze(-1)) + self.of_loss(loss.unsqueeze(-1))
        first, second = self.outputs(F.leaky_relu(hidden, 0.3)).unbind(-1)
        return first, second

    def forward(self, bits: Tensor, p: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        """From bits and slopes `[2, B, n]`, probabilities `[B, n]` and losses `[2, B]`."""
        n = bits.shape[-1]
        flipped = bits.unsqueeze(-2) + torch.eye(n) * (1 - 2 * bits).unsqueeze(-2)  # [2, B, flips, n]
        other_bits, other_loss, other_slope = bits.flip(0), loss.flip(0), slope.flip(0)
        own = (other_slope * (bits - other_bits)).sum(-1)  # [2, B]
        changed = (other_slope.unsqueeze(-2) * (flipped - other_bits.unsqueeze(-2))).sum(-1)  # [2, B, flips]
        first, second = self.surrogates(other_loss, own)
        first_flipped, second_flipped = self.surrogates(other_loss.unsqueeze(-1).expand_as(changed), changed)
        # Gibbs sampling flips bit i with probability q(other value); the mean over i of E[h] - h
        flip = p * (1 - bits) + (1 - p) * bits  # [2, B, n]
        stein = (flip * (first_flipped - first.unsqueeze(-1))).mean(-1)  # [2, B]
        score, scores = bits - p, flipped - p.unsqueeze(-2)
        moved = second_flipped.unsqueeze(-1) * scores - (second.unsqueeze(-1) * score).unsqueeze(-2)
        variate = (flip.unsqueeze(-1) * moved).mean(-2)  # [2, B, n]
        baseline = (loss + self.alpha * stein).flip(0)
        return ((loss - baseline).unsqueeze(-1) * score + self.beta * variate).mean(0)


def published(logits: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Callable[[Tensor], Tensor]:
    """Gradients for the log-odds `[B, n]` of logits `[B, n, 2]`, after training."""
    estimator = Published()
    optimizer = torch.optim.Adam(estimator.parameters(), RATE)

    def gradient(logits: Tensor) -> Tensor:
        codes = dgrad.latent(f"{logits.shape[1]}x2").sample(logits, 2).requires_grad_()
        losses = loss(codes).float()
        (slope,) = torch.autograd.grad(losses.sum(), codes)
        codes = codes.detach()
        result: Tensor = estimator(
            codes[..., 1], logits.softmax(-1)[..., 1], losses.detach(), slope[..., 1] - slope[..., 0]
        )
        return result

    for _ in range(steps):
        optimizer.zero_grad()
        gradient(logits).square().mean().backward()
        optimizer.step()
    return lambda logits: gradient(logits).detach()


def ours(
    name: str, logits: Tensor, loss: Callable[[Tensor], Tensor], steps: int, **hyperparameters: object
) -> Callable[[Tensor], Tensor]:
    """The same of a registered estimator, whose parameters learn by the same optimizer."""
    layer, estimator = dgrad.latent(f"{logits.shape[1]}x2"), dgrad.estimator(name, **hyperparameters)
    parameters = list(estimator.parameters())
    optimizer = torch.optim.Adam(parameters, RATE) if parameters else None

    def gradient(logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        estimator(layer, leaf, loss).loss.mean().backward()
        assert leaf.grad is not None
        return leaf.grad[..., 1] * len(logits)

    for _ in range(steps):
        gradient(logits)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    estimator.eval()
    return gradient


def variance(gradient: Callable[[Tensor], Tensor], logits: Tensor, draws: int) -> float:
    """Summed over the variables, averaged over the batch."""
    at_once = 200
    parts = [
        gradient(logits.repeat(at_once, 1, 1)).unflatten(0, (at_once, -1)) for _ in range(max(1, draws // at_once))
    ]
    return float(torch.cat(parts).var(0).sum(-1).mean())


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--latents", default="4x2,20x2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| latent | objective | `rloo` | `rodeo` | `rodeo surrogate=network` | the paper's | network / paper's |")
    print("|---|---|---|---|---|---|---|")
    for latent in arguments.latents.split(","):
        for objective in OBJECTIVES:
            layer = dgrad.latent(latent)
            logits = small_logits(layer, batch=BATCH).float()
            wide = small_objectives(layer)[objective]
            figures = []
            for make in (
                lambda *given: ours("rloo", *given, samples=2),
                lambda *given: ours("rodeo", *given, samples=2),
                lambda *given: ours("rodeo", *given, samples=2, surrogate="network"),
                published,
            ):
                torch.manual_seed(0)
                trained = make(logits, lambda codes, wide=wide: wide(codes).to(codes.dtype), arguments.steps)
                figures.append(variance(trained, logits, arguments.draws))
            cells = " | ".join(f"{figure:.4f}" for figure in figures)
            print(f"| {latent} | {objective} | {cells} | {figures[2] / figures[3]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
