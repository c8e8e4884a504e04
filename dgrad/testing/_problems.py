"""Small problems whose exact gradient is known by enumeration.

`exact_gradient` is the truth, `monte_carlo_gradient` the mean and standard error of an estimator. Both are for the
logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import CodeLoss
from dgrad.core.sites import restricted


def small_logits(layer: LatentLayer, *, batch: int = 1, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal logits `[batch, *layer.shape]` in float64 from a fixed seed."""
    return scale * torch.randn(batch, *layer.shape, dtype=torch.float64, generator=Generator().manual_seed(seed))


def small_objectives(layer: LatentLayer, *, seed: int = 0, device: str = "cpu") -> dict[str, CodeLoss]:
    """Losses of codes, of the kinds that tell estimators apart.

    They are linear, smooth (a quadratic), a cross-entropy, spiky, and one with steps. All are defined on relaxed codes
    too; `steps` has no useful gradient there.
    """
    size = math.prod(layer.shape)
    generator = Generator().manual_seed(seed)
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator).to(device)
    weight = torch.randn(8, size, dtype=torch.float64, generator=generator).to(device)
    pixels = (torch.rand(8, dtype=torch.float64, generator=generator) < 0.5).double().to(device)
    slope = torch.randn(size, dtype=torch.float64, generator=generator).to(device)

    def flat(codes: Tensor) -> Tensor:
        return codes.double().flatten(2)

    def linear(codes: Tensor) -> Tensor:
        return flat(codes) @ slope

    def smooth(codes: Tensor) -> Tensor:
        return torch.einsum("sbi,ij,sbj->sb", flat(codes), mixing, flat(codes)) / size**0.5

    def cross_entropy(codes: Tensor) -> Tensor:
        outputs = flat(codes) @ weight.T
        return (torch.nn.functional.softplus(outputs) - pixels * outputs).sum(-1)

    def spiky(codes: Tensor) -> Tensor:
        return 3 * torch.sin(7 * flat(codes) @ mixing[0]) + flat(codes)[..., 0]

    def steps(codes: Tensor) -> Tensor:
        return torch.floor(2 * flat(codes) @ mixing[0])

    return {"linear": linear, "smooth": smooth, "cross-entropy": cross_entropy, "spiky": spiky, "steps": steps}


def exact_gradient(
    layer: LatentLayer,
    logits: Float[Tensor, "batch *code"],
    objective: CodeLoss,
    *,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Float[Tensor, "batch *code"]:
    """The gradient of `sum_b E_q[f(z_b)]` for the logits, by enumeration of the support.

    Args:
        mask, allowed: padding and forbidden values, as an estimator takes them.

    Raises:
        InputError: the support is too large to be listed.
    """
    logits = logits.detach().requires_grad_()
    if mask is not None or allowed is not None:
        layer = restricted(layer, mask=mask, allowed=allowed)
    codes, log_q = layer.support(logits)
    losses = objective(codes.expand(-1, *logits.shape))
    (gradient,) = torch.autograd.grad((log_q.exp() * losses).sum(), logits)
    return gradient


def monte_carlo_gradient(
    estimator: GradientEstimator,
    layer: LatentLayer,
    logits: Float[Tensor, "one *code"],
    objective: CodeLoss | Callable[[Tensor], Tensor],
    *,
    draws: int,
    seed: int = 0,
    at_once: int = 50_000,
) -> tuple[Float[Tensor, "*code"], Float[Tensor, "*code"]]:
    """The mean gradient of an estimator over independent draws, and its standard error.

    Args:
        logits: of one example.
        at_once: how many draws make a batch.
    """
    generator = Generator().manual_seed(seed)
    gradients = []
    for start in range(0, draws, at_once):
        repeated = logits.detach().expand(min(at_once, draws - start), *logits.shape[1:]).clone().requires_grad_()
        estimate = estimator(layer, repeated, objective, generator=generator)
        gradients.append(torch.autograd.grad(estimate.loss.sum(), repeated)[0])
    everything = torch.cat(gradients)
    return everything.mean(0), everything.std(0) / draws**0.5
