"""Direct optimization with each row's own noise integrated out."""

from __future__ import annotations

from torch import Generator, Tensor

from dgrad import Estimate, ExactLimit, GradientEstimator, LatentLayer, Objective, Schedule, Traits, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._differences import DIFFERENCES, difference
from dgrad_plugins.estimators._sweep_share import UNIFORM, SweepShare


class DirectRaoBlackwell(GradientEstimator):
    """Direct optimization with each row's own Gumbel noise integrated out.

    backward (default), for row i: `[softmax(phi_i) - softmax(phi_i - eps T_i)] / eps`. Forward and central as for
    `direct`. `T_i`, the loss with row i changed, does not depend on row i's own sample: the mean over its noise is a
    softmax.

    A structured layer with `moves`, such as `pairs:15`, has `[E_q[z] - E_q'[z]] / eps`, `q'` with the logits `phi - eps
    T`. Given `T`, this is the mean of direct optimization with a Gumbel for every setting, which draws from `q`. As eps
    falls it becomes exact for a loss that is linear in the variables. Otherwise `T` depends on the code and leaves a
    bias.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: for rows O(eps), central O(eps^2), the same as `direct`. The variance is much lower and does not grow as
    epsilon falls. With the KL inside the objective and a uniform prior, backward is a gradient of a divergence from row
    i's posterior, given the other rows, to its q: the Rényi divergence of order 1 - epsilon, over 1 - epsilon; the KL
    at epsilon 1.

    With `sweep=surrogate` the table is a quadratic of the code. As epsilon falls it is exact for a linear loss, and not
    beyond. `sweep=corrected` has the mean of `sweep=exact` at the same epsilon.

    Cost: S (m(k-1) + 1) evaluations. `sweep_share` below 1 sweeps m of the n rows, drawn where q is undecided. A
    surrogate costs S + 1 evaluations and two backward passes to the code. A corrected sweep costs both.

    Reference: this project; Rao-Blackwellisation of Lorberbom et al. 2019. Its limit as epsilon falls is `leg`.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("direct-rb", epsilon=1e-3)(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> [round(value, 3) for value in logits.grad.flatten().tolist()]
    [-0.25, 0.25]
    """

    epsilon: Tensor

    def __init__(
        self,
        epsilon: float | Schedule = 0.1,
        samples: int = 1,
        difference: str = "backward",
        sweep: str = "exact",
        sweep_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.hyperparameter("epsilon", epsilon, above=0)
        self.samples = check_count("samples", samples)
        self.difference = check_choice("difference", difference, DIFFERENCES)
        self.sweep = sweep
        self.sweep_share = SweepShare(sweep_share, sweep)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=self.sweep_share.differentiable,
            evaluations=lambda layer: self.sweep_share.evaluations(layer, self.samples),
            reference="this project",
            why_unsupported=self.sweep_share.why_unsupported("direct-rb"),
            kl_inside=True,
            independent_examples=not self.sweep_share.differentiable,
            limit=ExactLimit(self.sweep_share.exact_for, {"epsilon": 0.01}, rows_only=True),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, *code]
        at = objective.at(codes, differentiable=self.sweep_share.differentiable)
        mean = layer.mean(logits)
        direction = self.sweep_share.direction(
            objective,
            at,
            layer,
            lambda table: difference(layer.mean, logits, table, self.epsilon, self.difference, middle=mean),
            mean=lambda: mean,
            weights=lambda: (1 - mean.square().sum(-1)).expand(codes.shape[:-1]),
            generator=generator,
            uniform=self.epsilon.clamp(UNIFORM, 1),
        )  # [S, B, *code]
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)
