"""How many steps bring back a value that q has given up: `python -m benchmarks.given_up_value`. Nothing is trained."""

from __future__ import annotations

import torch

import dgrad

MOST = 300


def steps_until_revived(estimator: dgrad.GradientEstimator, most: int = MOST) -> int | None:
    """Steps of size 1 on the logits until q of the best value exceeds 1/2, or None."""
    layer = dgrad.latent("1x40")
    posterior = torch.full((40,), 0.1 / 39)
    posterior[7] = 0.9
    logits = torch.zeros(1, 1, 40)
    logits[..., 7] = -24.0  # q = 1e-12
    for step in range(most):
        q = logits.softmax(-1)
        if float(q[..., 7]) > 0.5:
            return step
        losses = (q / posterior).log()  # log q(z) - log p(z | x): the bound but for a constant

        def objective(codes: torch.Tensor, losses: torch.Tensor = losses) -> torch.Tensor:
            return (codes * losses).sum((-1, -2))

        logits.requires_grad_()
        loss = estimator(layer, logits, objective, generator=torch.Generator().manual_seed(step)).loss.sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = logits.detach() - gradient
    return None


if __name__ == "__main__":
    print("exact:", steps_until_revived(dgrad.estimator("exact")))
    for epsilon in (0.1, 0.8, 0.9, 1.0):
        print(f"direct-rb, epsilon {epsilon}:", steps_until_revived(dgrad.estimator("direct-rb", epsilon=epsilon)))
