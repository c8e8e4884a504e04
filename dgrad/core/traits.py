"""What is true of an estimator: its bias, what it needs of an objective, and which layers it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dgrad.core.latent_layer import LatentLayer


@dataclass(frozen=True)
class ExactLimit:
    """Where a biased estimator's mean gradient becomes exact.

    Attributes:
        exact_for: the objectives for which it does: `linear` in the code, `quadratic`, or `any`. For an estimator that
            needs a differentiable objective, `any` means any smooth one.
        at: values of its hyper-parameters at which it is within 3 % of the limit, on problems of the kit's size.
        rows_only: whether it does so for one-hot rows alone, and keeps a bias on structured layers.
    """

    exact_for: str
    at: Mapping[str, float] = field(default_factory=dict)
    rows_only: bool = False


Limit = ExactLimit
"""Its former name."""


@dataclass(frozen=True)
class Traits:
    """What is true of an estimator with the hyper-parameters it has.

    Attributes:
        unbiased: whether the mean of its gradient is the gradient of `E_q[f(z)]`.
        differentiable_objective: whether it needs the objective's gradient in the codes.
        evaluations: how many evaluations of the objective one example costs with a given layer.
        reference: the paper.
        why_unsupported: why it cannot work with a given layer, or None where it can.
        independent_examples: whether an example's gradient depends on nothing but that example.
        kl_inside: whether it trains better with the KL inside its objective than beside it.
        unbiased_value: whether the mean of its loss's value is `E_q[f(z)]`. It is not where relaxed codes are
            evaluated.
        perturbs: whether its codes are those of perturbed logits, `argmax(logits + layer.noise(...))`. These are draws
            of q where a code's parts are independent, not on structured layers.
        limit: where the bias of a biased one vanishes; None where it vanishes nowhere that can be stated.
        one_pass: whether the objective is evaluated only at codes that are drawn first, and never differentiated in
            them: `draw` works.
        pathwise: whether its gradient is that of a code with a gradient: `codes` works, and examples may be coupled.
        losses_of_sites: whether each variable may have a loss of its own, so that `credit="future"` saves variance. It
            calls the objective once, at draws of q, and weights what is 0 in the mean by the loss.
    """

    unbiased: bool
    differentiable_objective: bool
    evaluations: Callable[[LatentLayer], int]
    reference: str
    why_unsupported: Callable[[LatentLayer], str | None] = lambda layer: None
    independent_examples: bool = True
    kl_inside: bool = False
    unbiased_value: bool = True
    perturbs: bool = False
    limit: ExactLimit | None = None
    one_pass: bool = False
    pathwise: bool = False
    losses_of_sites: bool = False

    def supports(self, layer: LatentLayer) -> bool:
        """Whether the estimator works with this layer."""
        return self.why_unsupported(layer) is None

    def value_is_unbiased(self, layer: LatentLayer) -> bool:
        """Whether the mean of the loss's value is `E_q[f(z)]` with this layer."""
        return self.unbiased_value and (layer.independent_parts or not self.perturbs)
