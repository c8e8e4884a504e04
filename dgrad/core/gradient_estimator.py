"""The contract of a gradient estimator.

An estimator turns `(layer, logits, objective)` into an `Estimate`: a loss for each example. Its value estimates
`E_q[f(z)]`. Its gradient, for the encoder's logits and for everything inside the objective, *is* the estimator's
gradient.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad.core.arguments import check_arguments
from dgrad.core.estimator_tools import check_choice
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_backward_pass, in_inference_mode, in_transform
from dgrad.core.objectives import CodeLoss, Objective, differentiated
from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.core.site_objectives import ProblemObjective, objective_of
from dgrad.core.sites import Problem, prepare
from dgrad.errors import DgradWarning, InputError

Itself = TypeVar("Itself", bound="GradientEstimator")
Function = TypeVar("Function", bound=Callable[..., Any])

CALLS_WITHOUT_A_STEP = 100
"""After how many training calls a warning says that nobody moves the schedules."""


def _typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that gives a method the type of another, for type checkers alone."""
    return lambda method: function


ONE_PASS = (
    "arm, arms, arsm, bitflip-1, direct-unbiased, disarm, exact, reinforce, relax, rloo, sum-and-sample, unordered-set"
)
PATHWISE = (
    "aimle, direct-linear, gapped-st, gumbel-softmax, imle, perturbed, rao-st-gumbel-softmax, reinmax, reinmax-rao, "
    "st-gumbel-softmax, straight-through"
)
"""The built-in estimators with the two traits, for error messages. A test holds them to the traits."""


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


class GradientEstimator(nn.Module, ABC):
    """An estimator of the gradient of `E_{z ~ q(z | logits)}[f(z)]`.

    Hyper-parameters are numbers or schedules (`hyperparameter`). What an estimator learns or averages are its own
    parameters and buffers: they travel in its state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        # Training calls while nobody has set a step; None where that is no matter.
        self._calls_without_step: int | None = None

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
        return problem.codes(codes).to(logits.dtype)

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
        _check_estimate(f"{type(self).__name__}.estimate", estimate, problem.logits)
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
        if self._calls_without_step is not None and self.training:
            self._calls_without_step += 1
            if self._calls_without_step == CALLS_WITHOUT_A_STEP:
                still = ", ".join(f"{key}={value}" for key, value in self.schedules.items() if not _is_constant(value))
                warnings.warn(
                    f"{name}: {still} has not moved in {CALLS_WITHOUT_A_STEP} training calls; expected "
                    "estimator.set_run_length(steps) once and estimator.set_step(step) at each step",
                    DgradWarning,
                    stacklevel=5,
                )

    def hyperparameter(self, name: str, value: float | str | Schedule, *, above: float | None = None) -> None:
        """Declare a hyper-parameter: `self.name` becomes a 0-d buffer that holds the value of the current step.

        Raises:
            InputError: a value of the schedule is not above `above`.
        """
        self.schedules[name] = schedule(value)
        # As the buffer will hold it: a number that float32 rounds to the limit is not above it.
        if above is not None and not torch.tensor(self.schedules[name].lowest, dtype=torch.float32) > above:
            raise InputError(f"{name} must stay above {above:g}; got {self.schedules[name]}: give a larger one")
        moves = not _is_constant(self.schedules[name])
        start = self.schedules[name].over(1) if moves else self.schedules[name]
        self.register_buffer(name, torch.tensor(start(0), dtype=torch.float32), persistent=False)
        if moves and type(self).set_step is GradientEstimator.set_step:
            self._calls_without_step = 0

    def set_layer(self, layer: LatentLayer) -> None:
        """Make the learned parts whose size depends on the layer.

        Call it before the optimizer is made and before a state dict is loaded. Without such parts nothing happens.
        """

    def set_run_length(self, steps: int) -> None:
        """Tell schedules that span the whole run how many steps it has."""
        self.schedules = {name: value.over(steps) for name, value in self.schedules.items()}

    def set_step(self, step: int) -> None:
        """Set every scheduled hyper-parameter to its value at `step`, without waiting for the device.

        Raises:
            InputError: a schedule spans the whole run, and nobody has told its length.
        """
        self._calls_without_step = None
        for name, value in self.schedules.items():
            if not _is_constant(value):
                getattr(self, name).fill_(value(step))

    def _keeps_averages(self) -> bool:
        """Whether buffers travel in the state dict: what earlier calls have left."""
        return any(module._buffers.keys() - module._non_persistent_buffers_set for module in self.modules())

    def extra_repr(self) -> str:
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        shown = {name: getattr(self, name) for name in names if hasattr(self, name)} | self.schedules
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _apply(self: Itself, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Itself:
        """Move to a device or into a dtype. Buffers keep their dtype: float16 would round hyper-parameters."""
        before = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        with torch.inference_mode(False):  # inside, later updates would be refused
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for module, name, old in before:
                new = module._buffers[name]
                if new is not None and new.dtype != old.dtype:
                    module._buffers[name] = old.to(new.device)
        return self


def _is_constant(value: Schedule) -> bool:
    return isinstance(value, Constant)


def _of_no_example(problem: Problem, objective: Objective) -> Estimate:
    """The estimate of an empty batch: nothing is drawn, and averages have nothing to take in."""
    codes = problem.layer.argmax(problem.logits.detach()).unsqueeze(0)  # [1, 0, *code]
    # Connected to the logits and to what the objective trains, so that a backward pass gives empty gradients.
    return Estimate(loss=objective(codes).mean(0) + problem.logits.flatten(1).sum(-1), codes=codes)


@dataclass(frozen=True)
class Drawn:
    """What the first half of a one-pass estimator returns.

    Attributes:
        codes: `[S, B, *code]`, whose losses the second half needs.
        kept: whatever else it drew, or read from a state that moves; the batch is the second axis of each.
    """

    codes: Float[Tensor, "samples batch *code"]
    kept: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Draw:
    """Codes that were drawn, to act on now and to learn from later. Made by `estimator.draw(layer, logits)`.

    In an episode, each step has a draw. `Draw.cat` makes one of them, so that one pass of the policy learns from all.
    A draw may be made under `torch.no_grad` or `torch.inference_mode`. Then give `estimate` the logits again.

    Attributes:
        codes: `[S, B, *code]`, or `[S, B, T, *code]` of sequences, in the dtype of the logits. The estimator needs the
            loss of each.
    """

    estimator: GradientEstimator
    layer: LatentLayer
    logits: Float[Tensor, "batch *code"]
    codes: Float[Tensor, "samples batch *code"]
    drawn: Drawn
    mask: Tensor | None
    credit: str
    allowed: Tensor | None
    has_graph: bool

    def estimate(self, loss: Tensor, *, logits: Float[Tensor, "batch *code"] | None = None) -> Estimate:
        """The estimate that a call would have returned, from the losses of the codes.

        The estimator's averages take these losses in, as in a call. Baselines are from before the draw.

        Args:
            loss: `[S, B]`, lower is better: minus the return. `[S, B, T]` for `site` and `future` credit. A decoder
                behind it gets its gradient.
            logits: the same logits computed again, with a graph, by the parameters that drew the codes. After a change
                of the parameters the gradient is biased.

        Raises:
            InputError: losses or logits of another shape, or a draw without a graph and no logits.

        >>> import dgrad
        >>> layer, policy = dgrad.latent("1x2"), torch.nn.Linear(3, 2)
        >>> estimator, draws, states = dgrad.estimator("reinforce"), [], torch.rand(5, 3)
        >>> with torch.no_grad():
        ...     for state in states:
        ...         draws.append(estimator.draw(layer, policy(state).view(1, 1, 2)))
        >>> episode = dgrad.Draw.cat(draws)
        >>> returns = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
        >>> estimate = episode.estimate(-returns, logits=policy(states).view(5, 1, 2))
        >>> estimate.loss.mean().backward()
        """
        if logits is None:
            if torch.is_grad_enabled() and not self.has_graph:
                raise InputError(
                    "a draw without a graph, made under no_grad or inference_mode; expected draw.estimate(loss, "
                    "logits=policy(observations)): the same logits again, by the same parameters, with a graph"
                )
            logits = self.logits
        elif logits.shape != self.logits.shape:
            raise InputError(
                f"logits of shape {list(logits.shape)} for a draw from logits of shape {list(self.logits.shape)}; "
                "expected the same logits again"
            )
        self._check_loss(loss)
        # What was made under inference_mode cannot be saved for a backward pass.
        logits, mask, allowed = _outside_inference_mode(logits), self.mask, self.allowed
        problem = self.estimator._prepare(
            self.layer,
            logits,
            mask=None if mask is None else _outside_inference_mode(mask),
            credit=self.credit,
            allowed=None if allowed is None else _outside_inference_mode(allowed),
        )
        if problem.logits.dtype != logits.dtype or not loss.is_floating_point():
            loss = loss.to(problem.logits.dtype)
        drawn = Drawn(_outside_inference_mode(self.drawn.codes), tuple(map(_outside_inference_mode, self.drawn.kept)))
        estimate = self.estimator.estimate_from(problem.layer, problem.logits, drawn, problem.losses(loss))
        _check_estimate(f"{type(self.estimator).__name__}.estimate_from", estimate, problem.logits)
        return Estimate(loss=problem.loss(estimate.loss, loss), codes=problem.codes(estimate.codes))

    def _check_loss(self, loss: Any) -> None:
        expected = list(self.codes.shape[: 2 if self.credit == "example" else 3])
        if not isinstance(loss, Tensor):
            raise InputError(f"a loss of type {type(loss).__name__}; expected a tensor of shape {expected}")
        got, samples = list(loss.shape), expected[0]
        if got == expected:
            return
        remedy = ""
        if samples == 1 and got == expected[1:]:
            remedy = ": give loss.unsqueeze(0)"
        elif got in (expected[1:], [1, *expected[1:]]):
            remedy = (
                f": {type(self.estimator).__name__} needs the losses of {samples} codes for each example. Where an "
                "example can be tried once take reinforce or relax"
            )
        raise InputError(f"a loss of shape {got}; expected one for each code of the draw, {expected}{remedy}")

    @classmethod
    def cat(cls, draws: Sequence[Draw]) -> Draw:
        """One draw of several, along the batch: the steps of an episode, or of many that differ in length.

        Raises:
            InputError: there are none, they are of several estimators or layers, or their codes differ in shape.
        """
        if not draws:
            raise InputError("no draws; expected at least one")
        first = draws[0]
        if any(draw.estimator is not first.estimator or draw.layer != first.layer for draw in draws):
            raise InputError("draws of several estimators or latent layers; expected one estimator and one layer")
        if any(draw.credit != first.credit for draw in draws):
            raise InputError("draws with several kinds of credit; expected one")
        shapes = {(len(draw.codes), *draw.codes.shape[2:]) for draw in draws}
        if len(shapes) > 1:
            got = " and ".join(str(list(draw.codes.shape)) for draw in draws[:2])
            raise InputError(
                f"draws with codes of shapes such as {got}; expected as many samples and sites of all: mask= pads "
                "sequences, and an example with few allowed values may have fewer codes"
            )
        kept = zip(*(draw.drawn.kept for draw in draws), strict=True)
        return cls(
            first.estimator,
            first.layer,
            torch.cat([draw.logits for draw in draws]),
            torch.cat([draw.codes for draw in draws], 1),
            Drawn(torch.cat([draw.drawn.codes for draw in draws], 1), tuple(torch.cat(parts, 1) for parts in kept)),
            _cat_bools([draw.mask for draw in draws], [draw.logits.shape[:2] for draw in draws]),
            first.credit,
            _cat_bools([draw.allowed for draw in draws], [draw.logits.shape for draw in draws]),
            all(draw.has_graph for draw in draws),
        )


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy outside of inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _cat_bools(tensors: list[Tensor | None], shapes: list[torch.Size]) -> Tensor | None:
    """Along the batch, with True where there is none; None where there is none at all."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    device = given[0].device
    return torch.cat(
        [
            torch.ones(shape, dtype=torch.bool, device=device) if tensor is None else tensor
            for tensor, shape in zip(tensors, shapes, strict=True)
        ]
    )


def _undefined(estimator: GradientEstimator, methods: str) -> InputError:
    """The error of a plugin's estimator that lacks what its traits promise."""
    name = type(estimator).__name__
    return InputError(f"{name} does not define {methods}; expected estimate, or what its traits say: see {name}.traits")


def _check_estimate(name: str, estimate: Any, logits: Tensor) -> None:
    """Hold a plugin's estimator to the contract; by shapes alone, so that nothing waits for the device.

    Raises:
        InputError: what it returned is no `Estimate`, or its shapes are wrong.
    """
    if not isinstance(estimate, Estimate):
        raise InputError(f"{name} returned a {type(estimate).__name__}; expected an Estimate(loss=..., codes=...)")
    if estimate.loss.shape != logits.shape[:1]:
        raise InputError(
            f"{name} returned a loss of shape {list(estimate.loss.shape)}; expected one number for each "
            f"example, {list(logits.shape[:1])}: take the mean over the samples"
        )
    if estimate.codes.shape[1:] != logits.shape:
        raise InputError(
            f"{name} returned codes of shape {list(estimate.codes.shape)}; expected [samples, "
            f"{', '.join(map(str, logits.shape))}]"
        )
    if torch.is_grad_enabled() and logits.requires_grad and not estimate.loss.requires_grad:
        raise InputError(
            f"{name} returned a loss without a gradient; expected the estimator's: see dgrad.replace_gradient"
        )
