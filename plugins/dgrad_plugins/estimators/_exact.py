"""The exact gradient by enumeration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Objective, Traits
from dgrad.core.latent_layer import Logits
from dgrad.errors import approx_int

LARGEST_SUPPORT = 4096


class Exact(GradientEstimator):
    """The exact gradient: every code of the support is evaluated.

    `sum_z q(z) f(z)`, differentiated.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[K, B, *code]` with K the size of the support.

    Bias: none, and no variance.

    Cost: K evaluations, `k^n` for n variables of k values. Refused above a support of 4096 codes.

    Reference: the definition of the expectation; the ground truth of every test.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("exact")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: layer.support_size,
            reference="enumeration",
            why_unsupported=needs_small_support("exact", " or an estimator that samples"),
            one_pass=True,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes, log_q = layer.support(logits)  # [K, 1 or B, *code], [K, B]
        losses = losses_of_support(codes, len(logits), objective)
        # sum_z q(z) f(z)
        return Estimate(loss=(log_q.exp() * losses).sum(0), codes=codes.expand(-1, *logits.shape))

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        codes, _ = layer.support(logits.detach())
        return Drawn(codes.expand(-1, *logits.shape))  # [K, B, *code]

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        _, log_q = layer.support(logits)  # [K, B]
        return Estimate(loss=(log_q.exp() * loss).sum(0), codes=drawn.codes)


def losses_of_support(codes: Tensor, batch: int, objective: Objective) -> Tensor:
    """The loss of every example at its codes `[K, 1 or B, *code]`, `[K, B]`."""
    return objective.everywhere(codes.squeeze(1), batch) if codes.shape[1] == 1 else objective(codes)


def needs_small_support(name: str, remedy: str) -> Callable[[LatentLayer], str | None]:
    """Why an estimator that evaluates every code does not support a layer."""

    def why_unsupported(layer: LatentLayer) -> str | None:
        if layer.support_size <= LARGEST_SUPPORT:
            return None
        return (
            f"{name} evaluates every code and latent {layer} has {approx_int(layer.support_size)}; "
            f"expected at most {LARGEST_SUPPORT} (6x4, 12x2): take a smaller latent{remedy}"
        )

    return why_unsupported
