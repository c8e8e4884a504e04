"""The contract of a gradient estimator.

An estimator turns `(layer, logits, objective)` into an `Estimate`: a loss for each example. Its value estimates
`E_q[f(z)]`. Its gradient, for the encoder's logits and for everything inside the objective, *is* the estimator's
gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.arguments import check_arguments, check_layer
from dgrad.core.draws import Draw
from dgrad.core.estimates import Drawn, Estimate, check_estimate
from dgrad.core.estimator_tools import check_choice
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_backward_pass, in_inference_mode, in_transform
from dgrad.core.objectives import CodeLoss, Objective
from dgrad.core.scheduled_module import ScheduledModule
from dgrad.core.site_objectives import ProblemObjective, objective_of
from dgrad.core.sites import Problem, prepare
from dgrad.core.traits import Traits
from dgrad.core.wrapped_objectives import differentiated
from dgrad.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


def _typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that gives a method the type of another, for type checkers alone."""
    return lambda method: function


ONE_PASS = (
    "arm, arms, arsm, bitflip-1, direct-unbiased, disarm, exact, reinforce, relax, rloo, sum-and-sample, unordered-set"
)
PATHWISE = (
    "aimle, direct-linear, gapped-st, gumbel-softmax, imle, perturbed, rao-st-gumbel-softmax, reinmax, "
    "st-gumbel-softmax, straight-through"
)
"""The built-in estimators with the two traits, for error messages. A test holds them to the traits."""


class GradientEstimator(ScheduledModule, ABC):
    """An estimator of the gradient of `E_{z ~ q(z | logits)}[f(z)]`.

    Hyper-parameters are numbers or schedules (`hyperparameter`). What an estimator learns or averages are its own
    parameters and buffers: they travel in its state dict.
    """

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What is true of this instance."""

    def estimate(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        objective: Objective,
        *,
        generator: Generator | None = None,
    ) -> Estimate:
        """The estimate, for logits in float32 or wider and a layer that the traits support. Call the instance.

        Estimators with `draw_codes` and `estimate_from`, or with `differentiable_codes`, inherit it. Others define it.
        """
        if type(self).differentiable_codes is not GradientEstimator.differentiable_codes:
            codes, hard = self.differentiable_codes(layer, logits, generator=generator)
            return Estimate(loss=objective(codes).mean(0), codes=hard)
        drawn = self.draw_codes(layer, logits, generator=generator)
        return self.estimate_from(layer, logits, drawn, objective(drawn.codes))

    def draw_codes(
        self, layer: LatentLayer, logits: Float[Tensor, "batch *code"], *, generator: Generator | None = None
    ) -> Drawn:
        """The first half of a one-pass estimator: every code whose loss it needs. Nothing in it has a gradient."""
        raise _undefined(self, "draw_codes and estimate_from")

    def estimate_from(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        drawn: Drawn,
        loss: Float[Tensor, "samples batch"],
    ) -> Estimate:
        """The second half of a one-pass estimator: the estimate, from the loss of each code that was drawn."""
        raise _undefined(self, "draw_codes and estimate_from")

    def differentiable_codes(
        self, layer: LatentLayer, logits: Float[Tensor, "batch *code"], *, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "samples batch *code"], Float[Tensor, "samples batch *code"]]:
        """What a pathwise estimator evaluates: codes with a gradient, hard or relaxed. And the same codes, hard."""
        raise _undefined(self, "differentiable_codes")

    def draw(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        *,
        mask: Tensor | None = None,
        credit: str = "example",
        allowed: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Draw:
        """Codes to act on now. `draw.estimate(loss)` learns from their losses later.

        Args:
            layer, logits, mask, credit, allowed, generator: as for a call.

        Raises:
            InputError: the estimator evaluates more than the codes that it draws, or the logits do not fit.

        >>> import dgrad
        >>> layer, logits = dgrad.latent("1x3"), torch.zeros(4, 1, 3, requires_grad=True)
        >>> draw = dgrad.estimator("rloo", samples=2).draw(layer, logits)
        >>> losses = draw.codes[..., 0, 0]  # from an environment, a person, another program
        >>> draw.estimate(losses).loss.mean().backward()
        """
        if not self.traits.one_pass:
            raise InputError(
                f"{type(self).__name__} cannot draw codes now and learn later: it asks for the loss of other codes, or "
                f"for a derivative; expected one of {ONE_PASS}, or another estimator whose traits say one_pass"
            )
        self._check_call(layer, logits, generator)
        problem = self._prepare(layer, logits, mask=mask, credit=credit, allowed=allowed)
        drawn = self.draw_codes(problem.layer, problem.logits, generator=generator)
        codes = problem.codes(drawn.codes).to(logits.dtype, copy=True)  # the caller may change them
        if allowed is not None:
            allowed = allowed.expand(logits.shape)
        return Draw(self, layer, logits, codes, drawn, mask, credit, allowed, torch.is_grad_enabled())

    def codes(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        *,
        mask: Tensor | None = None,
        allowed: Tensor | None = None,
        reduction: str = "mean",
        generator: Generator | None = None,
    ) -> Float[Tensor, "samples batch *code"]:
        """Codes with a gradient, `[S, B, *code]`, for a loss that lives elsewhere.

        `estimator(layer, logits, f)` has the gradient of `f(estimator.codes(layer, logits))`. The codes are relaxed for
        `gumbel-softmax` and hard for all others.

        Args:
            layer, logits, mask, allowed, generator: as for a call.
            reduction: whether your total is the mean of the losses of samples and examples, or their `sum`. `imle`
                and `direct-linear` need to know: their step is in units of one loss.

        Raises:
            InputError: the estimator's gradient is not that of a code, or the logits do not fit.

        >>> import dgrad
        >>> layer, logits = dgrad.latent("1x3"), torch.zeros(4, 1, 3, requires_grad=True)
        >>> codes = dgrad.estimator("st-gumbel-softmax").codes(layer, logits)
        >>> codes[..., 0, 0].mean().backward()
        """
        check_choice("reduction", reduction, ("mean", "sum"))
        if not self.traits.pathwise:
            raise InputError(
                f"{type(self).__name__} has no code with a gradient: it learns from losses; expected one of "
                f"{PATHWISE}, or another estimator whose traits say pathwise"
            )
        self._check_call(layer, logits, generator)
        problem = self._prepare(layer, logits, mask=mask, allowed=allowed)
        wide = problem.logits.view_as(problem.logits)  # a tensor of its own, for a hook of its own
        codes, hard = self.differentiable_codes(problem.layer, wide, generator=generator)
        losses = hard.shape[0] * hard.shape[1]
        if reduction == "mean" and losses > 1 and codes.requires_grad:
            # The gradient that arrives is that of a mean: one loss has `losses` times as much.
            codes = codes.view_as(codes)
            codes.register_hook(lambda gradient: gradient * losses)
            wide.register_hook(lambda gradient: gradient / losses)
        return problem.codes(problem.nan_where_logits_are(codes, 1)).to(logits.dtype)

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

        The objective is one independent loss for each example: no example's loss may depend on the code of another.
        `dgrad.testing.check_objective` checks that.

        Logits of half precision are widened to float32 for the estimate; the objective still gets codes in their dtype.

        Logits of -inf forbid values. Forbidden values have probability 0 and are not evaluated. Their logits have no
        gradient. On other devices than the CPU and under `torch.compile` only `allowed` spares their evaluation. A
        logit of NaN or +inf makes the loss of its example NaN, and every gradient of it.

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
            InputError: the logits do not fit the layer, the estimator does not support it, or the objective is not one
                that the estimator can use.
        """
        self._check_call(layer, logits, generator, objective)
        problem = self._prepare(layer, logits, mask=mask, credit=credit, allowed=allowed)
        of_problem = objective_of(problem, objective)
        usable = self._accepted(of_problem)
        if len(problem.logits):
            estimate = self.estimate(problem.layer, problem.logits, usable, generator=generator)
        else:
            estimate = _of_no_example(problem, usable)
        check_estimate(f"{type(self).__name__}.estimate", estimate, problem.logits)
        loss = problem.nan_where_logits_are(estimate.loss)
        if problem.plain:
            return estimate if problem.seen_finite else Estimate(loss=loss, codes=estimate.codes)
        assert isinstance(of_problem, ProblemObjective)
        return Estimate(loss=problem.loss(loss, of_problem.losses), codes=problem.codes(estimate.codes))

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
            # in the caller's words, where that layer is refused too
            raise InputError((problem.sites is None and traits.why_unsupported(layer)) or why_unsupported)
        return problem

    def _accepted(self, objective: Objective) -> Objective:
        """The objective as this estimator uses it.

        Raises:
            InputError: it couples examples, and the estimator needs independent ones.
        """
        traits, name = self.traits, type(self).__name__
        if objective.couples_examples and not traits.pathwise:
            raise InputError(
                f"{name} takes each example's loss for a function of its own code, and this objective couples "
                "examples; expected independent losses, or an estimator that differentiates through the codes, such as "
                "gumbel-softmax"
            )
        return differentiated(objective, name) if traits.differentiable_objective else objective

    if TYPE_CHECKING:

        @_typed_as(forward)  # nn.Module says that a call returns Any
        def __call__(self) -> None: ...

    def learning(self) -> bool:
        """Whether averages take in what this call sees: in training mode, outside `torch.inference_mode`.

        Ask before you update a buffer in `estimate`.
        """
        return self.training and not in_inference_mode()

    def _check_call(self, layer: Any, logits: Any, generator: Any, *objective: Any) -> None:
        """See that the call can be made where it is, and that somebody moves the schedules.

        Raises:
            InputError: an argument is of another kind, a checkpoint repeats a call that cannot be repeated, or a
                transform has averages to update.
        """
        check_arguments(layer, logits, generator, *objective)
        if torch.compiler.is_compiling():
            if generator is not None:
                raise InputError(
                    "torch.compile cannot trace a generator; expected the global generator, which torch.manual_seed "
                    "seeds: leave generator out"
                )
            return
        name = type(self).__name__
        if in_backward_pass():
            if generator is not None:
                raise InputError(
                    "torch.utils.checkpoint repeats a call with a generator, which has moved on and would draw other "
                    "codes; expected the global generator, whose state the checkpoint restores: leave generator out"
                )
            if self.training and self._keeps_averages():
                raise InputError(
                    f"{name} keeps averages, which have moved since the call that torch.utils.checkpoint repeats; "
                    "expected no repetition: call the estimator outside the checkpoint, or .eval() it"
                )
        if in_transform() and self.training and self._keeps_averages():
            raise InputError(
                f"{name} keeps averages, which torch.func's transforms cannot update; expected averages that stand "
                "still: call .eval() on the estimator"
            )
        self.warn_of_still_schedules()

    def set_layer(self, layer: LatentLayer) -> None:
        """Make the learned parts whose size depends on the layer.

        Call it before the optimizer is made and before a state dict is loaded. Without such parts nothing happens.

        Raises:
            InputError: it is no latent layer.
        """
        check_layer(layer)

    def _keeps_averages(self) -> bool:
        """Whether buffers travel in the state dict: what earlier calls have left."""
        return any(module._buffers.keys() - module._non_persistent_buffers_set for module in self.modules())


def _of_no_example(problem: Problem, objective: Objective) -> Estimate:
    """The estimate of an empty batch: nothing is drawn, and averages have nothing to take in."""
    codes = problem.layer.argmax(problem.logits.detach()).unsqueeze(0)  # [1, 0, *code]
    # Connected to the logits and to what the objective trains, so that a backward pass gives empty gradients.
    return Estimate(loss=objective(codes).mean(0) + problem.logits.flatten(1).sum(-1), codes=codes)


def _undefined(estimator: GradientEstimator, methods: str) -> InputError:
    """The error of a plugin's estimator that lacks what its traits promise."""
    name = type(estimator).__name__
    return InputError(f"{name} does not define {methods}; expected estimate, or what its traits say: see {name}.traits")
