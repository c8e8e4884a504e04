"""Direct optimization along the objective's first-order expansion."""

from __future__ import annotations

from dgrad.core.schedules import Schedule
from dgrad_plugins.estimators._direct import Direct


class DirectLinear(Direct):
    """Direct optimization along the objective's first-order expansion: no sweep.

    backward (default): `[z(phi + G) - z(phi + G - eps h)] / eps`, with `h` the gradient of `f` at the code. Forward and
    central as for `direct`. It is `direct` with `sweep=linear`: `T[i,j] = f(z) + h_i . (onehot(j) - z_i)` differs from
    `h` by a constant in each row, which moves no argmax.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`. Any latent layer with a MAP solver.

    Bias: as epsilon falls it becomes exact for linear objectives, central for quadratic ones. The variance is ~ 1/eps.

    Cost: S evaluations and one backward pass.

    Reference: Lorberbom et al. 2019 (arXiv 1806.02867), linearised. One-sided it is also the I-MLE of Niepert et al.
    2021.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, requires_grad=True)
    >>> estimate = dgrad.estimator("direct-linear", epsilon=0.5)(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.loss.shape, estimate.codes.shape
    (torch.Size([2]), torch.Size([1, 2, 3, 4]))
    """

    def __init__(self, epsilon: float | Schedule = 0.1, samples: int = 1, difference: str = "backward") -> None:
        super().__init__(epsilon=epsilon, samples=samples, difference=difference, sweep="linear")
