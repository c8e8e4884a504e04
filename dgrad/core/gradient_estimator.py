"""The contract of a gradient estimator.

An estimator turns `(layer, logits, objective)` into an `Estimate`: a loss for each example. Its value estimates
`E_q[f(z)]`. Its gradient, for the encoder's logits and for everything inside the objective, *is* the estimator's
gradient.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad.core.arguments import check_arguments
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_backward_pass, in_inference_mode, in_transform
from dgrad.core.objectives import CodeLoss, Objective, as_objective, in_dtype
from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.errors import DgradWarning, InputError

Itself = TypeVar("Itself", bound="GradientEstimator")
Function = TypeVar("Function", bound=Callable[..., Any])

CALLS_WITHOUT_A_STEP = 100
"""After how many training calls a warning says that nobody moves the schedules."""


def _typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that gives a method the type of another, for type checkers alone."""
    return lambda method: function


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
        generator: Generator | None = None,
    ) -> Estimate:
        """Estimate the objective and its gradient.

        Logits of half precision are widened to float32 for the estimate; the objective still gets codes in their dtype.

        Args:
            layer: the family of distributions.
            logits: `[B, *layer.shape]`.
            objective: the loss of each example as a function of its code, `[S, B, *code] -> [S, B]`.
            generator: the source of all randomness, on the logits' device; the global generator where it is None.

        Raises:
            InputError: the logits do not fit the layer, or the estimator does not support it.
        """
        check_arguments(layer, logits, objective, generator)
        if not logits.is_floating_point():
            raise InputError(f"logits of {logits.dtype}; expected a floating-point tensor: convert them with .float()")
        if logits.shape[1:] != layer.shape:
            expected = ", ".join(map(str, ("batch", *layer.shape)))
            raise InputError(
                f"logits of shape {list(logits.shape)} do not fit the latent layer {layer}; expected [{expected}]"
            )
        why_unsupported = self.traits.why_unsupported(layer)
        if why_unsupported is not None:
            raise InputError(why_unsupported)
        objective = as_objective(objective)
        self._notice_call(generator)
        if len(logits) == 0:
            return _of_no_example(layer, logits, objective)
        wide = logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            wide, objective = logits.float(), in_dtype(objective, logits.dtype)
        estimate = self.estimate(layer, wide, objective, generator=generator)
        _check_estimate(type(self).__name__, estimate, logits, self.traits.differentiable_objective)
        return estimate

    if TYPE_CHECKING:

        @_typed_as(forward)  # nn.Module says that a call returns Any
        def __call__(self) -> None: ...

    def learning(self) -> bool:
        """Whether averages take in what this call sees: in training mode, outside `torch.inference_mode`.

        Ask before you update a buffer in `estimate`.
        """
        return self.training and not in_inference_mode()

    def _notice_call(self, generator: Generator | None) -> None:
        """See that the call can be repeated or transformed where it is, and that somebody moves the schedules.

        Raises:
            InputError: a checkpoint repeats a call that cannot be repeated, or a transform has averages to update.
        """
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


def _of_no_example(layer: LatentLayer, logits: Tensor, objective: Objective) -> Estimate:
    """The estimate of an empty batch: nothing is drawn, and averages have nothing to take in."""
    codes = layer.argmax(logits.detach()).unsqueeze(0)  # [1, 0, *code]
    # Connected to the logits and to what the objective trains, so that a backward pass gives empty gradients.
    return Estimate(loss=objective(codes).mean(0) + logits.flatten(1).sum(-1), codes=codes)


def _check_estimate(name: str, estimate: Any, logits: Tensor, differentiable: bool) -> None:
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
        if differentiable:
            raise InputError(
                f"the objective has no gradient in the codes, and {name} differentiates it; expected a loss that is "
                "computed from the codes by differentiable operations: or take rloo, or direct"
            )
        raise InputError(
            f"{name}.estimate returned a loss without a gradient; expected the estimator's: see dgrad.replace_gradient"
        )
