"""Direct optimization through argmax."""

from __future__ import annotations

from jaxtyping import Float
from torch import Generator, Tensor

from dgrad import (
    Estimate,
    ExactLimit,
    GradientEstimator,
    InputError,
    LatentLayer,
    Objective,
    Schedule,
    Traits,
    run_defaults,
)
from dgrad.core.estimator_tools import (
    carry_back,
    check_choice,
    check_count,
    needs,
    needs_all,
    perturb_and_map,
    replace_gradient,
)
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._differences import DIFFERENCES, difference
from dgrad_plugins.estimators._sweep_share import SWEEPS, SweepShare


@run_defaults(set={"epsilon": "stable-decay:1:0.1:0.3"}, lr="cosine:0.06:0")
class Direct(GradientEstimator):
    """Direct optimization: the argmax with and without epsilon times the loss.

    - backward (default): `[z(phi + G) - z(phi + G - eps T)] / eps`
    - forward (the paper's eq. 10): `[z(phi + G + eps T) - z(phi + G)] / eps`
    - central: their mean

    `G` is Gumbel noise, `z` the argmax, `T` the sweep: the loss with one coordinate changed. With one variable this is
    the paper's Theorem 1. With several it is the product-space approximation (section 5.2), whose limit as eps falls is
    exact too. A structured layer with `moves`, such as `pairs:15`, has `T` on the potentials of single variables, and
    its own noise.

    `sweep=surrogate` puts a quadratic of the code in the place of `T`, with the curvature of the batch.
    `sweep=corrected` adds an exact share of the rows, and has the mean of `sweep=exact`. Both are for decoders behind
    hidden layers.

    `sweep=linear` puts the gradient `h` of `f` at the code in the place of `T` (see `direct-linear`). `sweep_share`
    below 1 sweeps a share of the rows, drawn where the argmax is likely to change. The gradient keeps its mean.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: O(eps), central O(eps^2), once eps times the spread of T is small. On trained weights backward is much the
    least biased for eps >= 0.1. The variance is ~ 1/eps: the gradient is zero where the argmaxes agree.

    In a training run with the KL inside and without labels epsilon stays at 1 for 0.3 of the run, if nobody gives it,
    and falls to 0.1. Near 1 the gradient brings back values that q has given up.

    Cost: S (m(k-1) + 1) evaluations, m of n rows. With the linear sweep S and one backward pass. With the surrogate S +
    1 and two backward passes to the code.

    Reference: Lorberbom, Gane, Jaakkola & Hazan 2019 (arXiv 1806.02867). Backward is the sign of the authors' code.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, requires_grad=True)
    >>> estimator = dgrad.estimator("direct", epsilon=0.5)
    >>> generator = torch.Generator().manual_seed(0)
    >>> estimate = estimator(layer, logits, lambda codes: codes[..., 0].sum(-1), generator=generator)
    >>> estimate.loss.shape, estimate.codes.shape
    (torch.Size([2]), torch.Size([1, 2, 3, 4]))
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
        self.sweep = check_choice("sweep", sweep, (*SWEEPS, "linear"))
        self.sweep_share = SweepShare(sweep_share, "exact" if sweep == "linear" else sweep)
        if self.sweep == "linear" and self.sweep_share.share < 1:
            raise InputError(f"sweep_share {sweep_share} is a share of the exact sweep; leave it out with sweep=linear")

    @property
    def traits(self) -> Traits:
        if self.sweep == "linear":
            return Traits(
                unbiased=False,
                differentiable_objective=True,
                evaluations=lambda layer: self.samples,
                reference="Lorberbom et al. 2019",
                why_unsupported=needs("direct", "noise"),
                kl_inside=True,
                perturbs=True,
                # Where a small eps changes the code, two values tie. Central adds the slopes of both ends, the
                # trapezoidal rule. One-sided, an end counts only where its own slope points away from it.
                limit=ExactLimit("quadratic" if self.difference == "central" else "linear", {"epsilon": 0.005}),
                pathwise=True,
            )
        return Traits(
            unbiased=False,
            differentiable_objective=self.sweep_share.differentiable,
            evaluations=lambda layer: self.sweep_share.evaluations(layer, self.samples),
            reference="Lorberbom et al. 2019",
            why_unsupported=needs_all(self.sweep_share.why_unsupported("direct"), needs("direct", "noise")),
            kl_inside=True,
            perturbs=True,
            independent_examples=not self.sweep_share.differentiable,
            limit=ExactLimit(self.sweep_share.exact_for, {"epsilon": 0.01}, rows_only=True),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        if self.sweep == "linear":
            at = objective.at(codes, differentiable=True)
            # f(z) + h_i . (onehot(j) - z_i), less what is the same for every j of a row and moves no argmax
            direction = self._direction(layer, potentials, at.slope(), codes)
        else:
            at = objective.at(codes, differentiable=self.sweep_share.differentiable)
            direction = self.sweep_share.direction(
                objective,
                at,
                layer,
                lambda table: self._direction(layer, potentials, table, codes),
                mean=lambda: layer.mean(logits),
                weights=lambda: _likely_to_change(potentials, self.epsilon),
                generator=generator,
            )  # [S, B, *code]
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        return carry_back(codes, logits, lambda slope: self._direction(layer, potentials, slope, codes)), codes

    def _direction(self, layer: LatentLayer, potentials: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        return difference(layer.argmax, potentials, table, self.epsilon, self.difference, middle=codes)


def _likely_to_change(
    potentials: Float[Tensor, "samples batch n k"], epsilon: Tensor
) -> Float[Tensor, "samples batch n"]:
    """A weight for each row: 1 where two values tie, less the more epsilon times the loss has to move."""
    largest, second = potentials.topk(2, -1).values.unbind(-1)
    return epsilon / (epsilon + largest - second)
