"""The contract of a gradient estimator.

An estimator turns `(layer, logits, objective)` into an `Estimate`: a loss for each example. Its value estimates
`E_q[f(z)]`. Its gradient, for the encoder's logits and for everything inside the objective, *is* the estimator's
gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import CodeLoss, Objective
from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.core.site_objectives import ProblemObjective, objective_of
from dgrad.core.sites import Problem, prepare
from dgrad.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Attributes:
        loss: `[B]`, estimates `E_q[f(z)]` for each example; its gradient is the estimator's.
        codes: `[S, B, *code]`, the hard codes that were drawn (for `exact`: the whole support).
    """

    loss: Float[Tensor, " batch"]
    codes: Float[Tensor, "samples batch *code"]


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
    losses_of_sites: bool = False

    def supports(self, layer: LatentLayer) -> bool:
        """Whether the estimator works with this layer."""
        return self.why_unsupported(layer) is None

    def value_is_unbiased(self, layer: LatentLayer) -> bool:
        """Whether the mean of the loss's value is `E_q[f(z)]` with this layer."""
        return self.unbiased_value and (layer.independent_parts or not self.perturbs)


class GradientEstimator(nn.Module, ABC):
    """An estimator of the gradient of `E_{z ~ q(z | logits)}[f(z)]`.

    Hyper-parameters are numbers or schedules (`hyperparameter`). What an estimator learns or averages are its own
    parameters and buffers: they travel in its state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What is true of this instance."""

    @abstractmethod
    def estimate(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        objective: Objective,
        *,
        generator: Generator | None = None,
    ) -> Estimate:
        """The estimate, for logits in float32 or wider and a layer that the traits support. Call the instance."""

    def forward(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        objective: Objective | CodeLoss,
        *,
        mask: Tensor | None = None,
        credit: str = "example",
        allowed: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Estimate:
        """Estimate the objective and its gradient.

        Logits of half precision are widened to float32 for the estimate; the objective still gets codes in their dtype.

        Logits of -inf forbid values. Forbidden values have probability 0 and are not evaluated. Their logits have no
        gradient. On other devices than the CPU and under `torch.compile` only `allowed` spares their evaluation.

        A sequence is one example of T sites: logits `[B, T, *layer.shape]` and codes `[S, B, T, *layer.shape]`. The
        code of a padded site is zeros.

        Args:
            layer: the family of distributions.
            logits: `[B, *layer.shape]`, or `[B, T, *layer.shape]`.
            objective: the loss of each example as a function of its code, `[S, B, *code] -> [S, B]`.
            mask: bool `[B, T]`, False where a site is padding: without a draw, an evaluation or a gradient.
            credit: what a site's code can change. `example`: the loss of its example. `site`: the loss of its site
                alone; `future`: the losses of its site and the later ones. For these two the objective gives a loss for
                each site, `[S, B, T]`. Their sum is estimated.
            allowed: bool, broadcasts against the logits, False where a value is forbidden.
            generator: the source of all randomness, on the logits' device; the global generator where it is None.

        Raises:
            InputError: the logits do not fit the layer, or the estimator does not support it.
        """
        problem = self._prepare(layer, logits, mask=mask, credit=credit, allowed=allowed)
        of_problem = objective_of(problem, objective)
        estimate = self.estimate(problem.layer, problem.logits, of_problem, generator=generator)
        _check_estimate(type(self).__name__, estimate, problem.logits)
        if problem.plain:
            return estimate
        assert isinstance(of_problem, ProblemObjective)
        return Estimate(loss=problem.loss(estimate.loss, of_problem.losses), codes=problem.codes(estimate.codes))

    def _prepare(
        self,
        layer: LatentLayer,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        credit: str = "example",
        allowed: Tensor | None = None,
    ) -> Problem:
        """The plain problem of a call: a layer that the estimator supports, and finite logits.

        Raises:
            InputError: the logits do not fit the layer, or the estimator does not support it.
        """
        traits = self.traits
        problem = prepare(layer, logits, mask=mask, allowed=allowed, credit=credit, local_losses=traits.losses_of_sites)
        why_unsupported = traits.why_unsupported(problem.layer)
        if why_unsupported is not None:
            raise InputError(why_unsupported)
        return problem

    def hyperparameter(self, name: str, value: float | str | Schedule, *, above: float | None = None) -> None:
        """Declare a hyper-parameter: `self.name` becomes a 0-d buffer that holds the value of the current step.

        Raises:
            InputError: a value of the schedule is not above `above`.
        """
        self.schedules[name] = schedule(value)
        # As the buffer will hold it: a number that float32 rounds to the limit is not above it.
        if above is not None and not torch.tensor(self.schedules[name].lowest, dtype=torch.float32) > above:
            raise InputError(f"{name} must stay above {above:g}; got {self.schedules[name]}: give a larger one")
        start = self.schedules[name] if isinstance(self.schedules[name], Constant) else self.schedules[name].over(1)
        self.register_buffer(name, torch.tensor(start(0), dtype=torch.float32), persistent=False)

    def set_layer(self, layer: LatentLayer) -> None:
        """Make the learned parts whose size depends on the layer.

        Call it before the optimizer is made and before a state dict is loaded. Without such parts nothing happens.
        """

    def set_run_length(self, steps: int) -> None:
        """Tell schedules that span the whole run how many steps it has."""
        self.schedules = {name: value.over(steps) for name, value in self.schedules.items()}

    def set_step(self, step: int) -> None:
        """Set every scheduled hyper-parameter to its value at `step`, without waiting for the device."""
        for name, value in self.schedules.items():
            if not isinstance(value, Constant):
                getattr(self, name).fill_(value(step))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.schedules.items())


def _check_estimate(name: str, estimate: Any, logits: Tensor) -> None:
    """Hold a plugin's estimator to the contract; by shapes alone, so that nothing waits for the device.

    Raises:
        InputError: what it returned is no `Estimate`, or its shapes are wrong.
    """
    if not isinstance(estimate, Estimate):
        raise InputError(
            f"{name}.estimate returned a {type(estimate).__name__}; expected an Estimate(loss=..., codes=...)"
        )
    if estimate.loss.shape != logits.shape[:1]:
        raise InputError(
            f"{name}.estimate returned a loss of shape {list(estimate.loss.shape)}; expected one number for each "
            f"example, {list(logits.shape[:1])}: take the mean over the samples"
        )
    if estimate.codes.shape[1:] != logits.shape:
        raise InputError(
            f"{name}.estimate returned codes of shape {list(estimate.codes.shape)}; expected [samples, "
            f"{', '.join(map(str, logits.shape))}]"
        )
    if torch.is_grad_enabled() and logits.requires_grad and not estimate.loss.requires_grad:
        raise InputError(
            f"{name}.estimate returned a loss without a gradient; expected the estimator's: see dgrad.replace_gradient"
        )
