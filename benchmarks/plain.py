"""A step of an ordinary VAE with a relaxed code, in plain torch: what dgrad's steps are measured against."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN = "plain autograd"
COMPILED = "plain, torch.compile"


def dense(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def optimized(*modules: nn.Module) -> Callable[[Tensor], None]:
    """What changes the parameters of modules by the gradient of a loss, with the fastest Adam that torch has."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def plain_step(images: Tensor, n: int, k: int, hidden: list[int], *, compiled: bool = False) -> Callable[[], None]:
    """A step of an ordinary VAE with a relaxed code: the user's own loop, with nothing of dgrad.

    Args:
        images: `[B, D]`, binary; the same in every step.
        compiled: whether the loss, and so its gradient, goes through `torch.compile`.
    """
    encoder = dense([images.shape[1], *hidden, n * k]).to(images.device)
    decoder = dense([n * k, *reversed(hidden), images.shape[1]]).to(images.device)
    update = optimized(encoder, decoder)

    def loss() -> Tensor:
        logits = encoder(images).view(-1, n, k)
        code = F.gumbel_softmax(logits, tau=0.5)
        outputs = decoder(code.flatten(1))
        reconstruction = F.binary_cross_entropy_with_logits(outputs, images, reduction="none").sum(1)
        log_q = logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(k))).sum((1, 2))
        return (reconstruction + kl).mean()

    fastest = torch.compile(loss) if compiled else loss
    return lambda: update(fastest())


def plain_steps(images: Tensor, n: int, k: int, hidden: list[int], *, compiled: bool) -> dict[str, Callable[[], None]]:
    """The plain step, and with `compiled` the same under `torch.compile`, where torch finds a compiler."""
    steps = {PLAIN: plain_step(images, n, k, hidden)}
    if compiled:
        step = plain_step(images, n, k, hidden, compiled=True)
        try:
            step()
        except Exception as error:  # whatever torch's compiler says: the plain step is a reference too
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"left out: {COMPILED} ({reason})", file=sys.stderr)
        else:
            steps[COMPILED] = step
    return steps
