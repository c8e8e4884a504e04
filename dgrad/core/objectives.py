"""Objectives: the loss of each example as a function of its code, and the arithmetic of such losses.

An objective is built anew for every batch, around that batch's data. It knows no model and no estimator.
"""

from __future__ import annotations

import copy
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.curvature import EXAMPLES, Curvature, combined, mean_of_products, random_signs
from dgrad.core.evaluations import CombinedEvaluation, Evaluation
from dgrad.core.modes import in_inference_mode, needs_transforms
from dgrad.core.objective_guards import BatchNormError, agree, identity_of, refusing_batch_norm
from dgrad.core.random import RandomState
from dgrad.core.sites import Problem
from dgrad.errors import InputError

CodeLoss = Callable[[Tensor], Tensor]
"""A loss of codes: `[S, B, *code] -> [S, B]`, for any number of samples S."""
WORTH_SHARING = 8
"""As many codes as pay for the two that are evaluated again to see whether evaluations can be shared."""


class Objective(ABC):
    """The loss of each example as a function of the code: `[S, B, *code] -> [S, B]`.

    An objective of your own defines `__call__`. Every changed code is then evaluated by a call. An objective with a
    faster sweep also overrides `evaluate`, to return an `Evaluation` of its own.

    Objectives add up (`reconstruction + kl`) and scale (`0.5 * kl`). A sum sweeps each part in that part's own best
    way.
    """

    couples_examples: bool = False
    """Whether an example's loss depends on the codes of others. Estimators that need independent ones refuse it."""
    bytes_per_call: int = 2**24
    """What the changed codes of one call of a sweep may take: a bound on memory. One change of each code fits."""
    least_bytes: int = 1024
    """A code counts for no fewer bytes: the loss needs memory of its own."""
    codes_per_call: int | None = None
    """How many changed codes, over the batch, a sweep hands to one call, whatever their bytes."""

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        """What tells this objective from others in the warning of an expensive sweep, and what is cheaper."""
        return type(self), ["a sweep of its own (Objective.evaluate)"]

    @abstractmethod
    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        """The loss of each code, differentiable in the parameters it uses and, where it can be, in the codes."""

    def at(self, codes: Float[Tensor, "samples #batch *code"], *, differentiable: bool = False) -> Evaluation:
        """Evaluate codes once: their loss, their sweep and whatever else an estimator asks about them.

        The evaluation has a copy of the codes. Changing yours afterwards changes nothing in it.

        Args:
            differentiable: whether `slope` will be asked, the gradient of the loss in the codes.
        """
        if not differentiable or in_inference_mode() or needs_transforms():
            return self.evaluate(codes.clone())
        with torch.enable_grad():
            return self.evaluate(codes.detach().clone().requires_grad_())

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        """The evaluation behind `at`, of codes that nobody changes. Override it to give an evaluation of your own."""
        state = RandomState(codes.device)
        loss = self(codes)
        return Evaluation(self, codes, loss, state if state.has_moved() else None)

    def sweep(self, codes: Float[Tensor, "samples batch n k"]) -> Float[Tensor, "samples batch n k"]:
        """The sweep of one-hot rows where nothing else is asked about them: `at(codes).sweep()`."""
        with torch.no_grad():
            return self.evaluate(codes).sweep()

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        """The mean over a batch of the loss's curvature in the code, for a surrogate of the sweep.

        It is measured with random signs, at one code of each of the first `EXAMPLES` examples. Here it is the Hessian:
        the loss needs a second derivative. A decoder has the Gauss-Newton matrix, which varies less.

        Args:
            generator: of the signs.

        Raises:
            InputError: the loss has no gradient in the codes.
        """
        at = self.at(codes, differentiable=True)
        signs = random_signs(codes.detach(), generator)
        products = at.hessian_times(signs)  # [1, B, *code]
        return mean_of_products(signs[0, :EXAMPLES], products[0, :EXAMPLES])

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        """The loss of each of `batch` examples at each of these codes, differentiable as a call is.

        The codes are the same for all examples. Where nothing but the code enters a decoder, it runs once for each
        code. The random numbers of a function or a decoder are the same for all codes.
        """
        return self(codes.unsqueeze(1).expand(-1, batch, *codes.shape[1:]))

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        """The same as `everywhere`, from one evaluation of each code for the whole batch, or None.

        None says that an evaluation cannot be shared. A sweep of one variable compares what it gets with the loss of
        the codes themselves, and does without where they differ.
        """
        return None

    def takes_rows(self, codes: Float[Tensor, "samples batch sites n k"]) -> bool:
        """Whether codes of sequences may come with all rows in one axis, `[S, B, T*n, k]`, for a faster sweep."""
        return False

    def of_call(self, problem: Problem) -> Objective:
        """This objective in a call of an estimator: for its padding, its allowed values and its credit.

        Raises:
            InputError: it is of another number of examples.
        """
        return self

    def changes_per_call(self, codes: Tensor, count: int) -> int:
        """How many changes a sweep hands to one call, where each is made to `count` codes like these."""
        if self.codes_per_call is not None:
            return max(1, self.codes_per_call // max(1, count))
        bytes_of_code = math.prod(codes.shape[2:]) * codes.element_size()
        return max(1, self.bytes_per_call // (max(1, count) * max(self.least_bytes, bytes_of_code)))

    def __add__(self, other: Objective | CodeLoss) -> Objective:
        return Sum(operator.add, self, as_objective(other)) if callable(other) else NotImplemented

    def __radd__(self, other: CodeLoss) -> Objective:
        return Sum(operator.add, as_objective(other), self) if callable(other) else NotImplemented

    def __sub__(self, other: Objective | CodeLoss) -> Objective:
        return Sum(operator.sub, self, as_objective(other)) if callable(other) else NotImplemented

    def __rmul__(self, weight: float | Tensor) -> Objective:
        if isinstance(weight, Tensor) and weight.ndim:  # it would broadcast against the last axis of a sweep
            raise InputError(
                f"a weight of shape {list(weight.shape)}; expected one number: weigh examples inside the objective's "
                "function, or weigh estimate.loss"
            )
        return Sum(lambda loss: weight * loss, self)

    __mul__ = __rmul__


def _floating(loss: Tensor, inputs: Tensor) -> Tensor:
    """The loss in a floating dtype: counts and booleans have no gradient, and sums of them no mean."""
    return loss if loss.is_floating_point() else loss.to(torch.promote_types(inputs.dtype, torch.float32))


LOSSES = {
    2: ("code", "samples, batch", "sum over everything but the first two axes"),
    3: ("site", "samples, batch, sites", "or take credit='example'"),
}
"""What the axes of a function's losses are."""


class FunctionObjective(Objective):
    """Any callable as an objective. Its sweep calls it on all changed codes, as many at a time as the budget allows.

    On a CPU, codes that all examples share are handed over once, as `[K, 1, *code]`. That is kept where the result
    broadcast to the batch and agrees with the loss of codes that were handed over for each example.

    Args:
        couples_examples: see `Objective`.
        bytes_per_call: what changed codes of one call may take.
        codes_per_call: how many there may be in one call, instead of a number of bytes.

    >>> objective = FunctionObjective(lambda codes: codes[..., 0].sum(-1))
    >>> at = objective.at(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    >>> at.loss
    tensor([[1.]])
    >>> at.sweep()
    tensor([[[[1., 0.],
              [2., 1.]]]])
    """

    loss_axes = 2
    """How many axes the losses have: samples and batch, and sites where each has a loss of its own."""

    def __init__(
        self,
        function: CodeLoss,
        *,
        couples_examples: bool = False,
        bytes_per_call: int | None = None,
        codes_per_call: int | None = None,
    ) -> None:
        self.function = function
        self.couples_examples = couples_examples
        self.bytes_per_call = self.bytes_per_call if bytes_per_call is None else bytes_per_call
        self.codes_per_call = codes_per_call

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        remedies = ["dgrad.objective(decoder=..., loss=...) for a decoder that begins with a linear layer"]
        return identity_of(self.function), [*remedies, "dgrad.objective(f, indices=True) for lookups"]

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        return self.loss_of(codes)

    def of_call(self, problem: Problem) -> Objective:
        return self if problem.credit == "example" else with_losses_of_sites(self)

    def loss_of(self, inputs: Tensor) -> Float[Tensor, "samples batch *sites"]:
        """The function's result for codes, in the form in which the function takes them."""
        loss, shape = self.function(inputs), inputs.shape[: self.loss_axes]
        if not isinstance(loss, Tensor) or loss.shape != shape:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            each, axes, remedy = LOSSES[self.loss_axes]
            raise InputError(
                f"the objective returned {got} for codes of shape {list(inputs.shape)}; expected one loss for each "
                f"{each}, [{axes}] = {list(shape)}: {remedy}"
            )
        return _floating(loss, inputs)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self._everywhere(codes, batch)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        return self._shared(codes, batch)

    def _everywhere(self, inputs: Tensor, batch: int) -> Tensor:
        each = inputs.unsqueeze(1).expand(-1, batch, *inputs.shape[1:])  # [K, B, *code]
        state = RandomState(inputs.device)
        with refusing_batch_norm():
            first = self.loss_of(each[:1])
            if state.has_moved():  # every code sees the random numbers of the first
                return torch.cat([first, *(state.again(self.loss_of, code) for code in each[1:].split(1))])
            shared = self._shared(inputs, batch) if len(inputs) >= WORTH_SHARING else None
            if shared is not None and agree(shared[[0, -1]], torch.cat([first, self.loss_of(each[-1:])])):
                return shared
            return torch.cat([first, self.loss_of(each[1:])])

    def _shared(self, inputs: Tensor, batch: int) -> Tensor | None:
        if inputs.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        state = RandomState(inputs.device)
        try:
            losses = _floating(self.function(inputs.unsqueeze(1)), inputs)
        except BatchNormError:
            raise
        except Exception:  # a function that wants the whole batch, in whatever way it says so
            return None
        broadcast = losses.shape in ((len(inputs), batch), (len(inputs), 1))
        return losses.expand(-1, batch) if broadcast and not state.has_moved() else None


class Sum(Objective):
    """A function of the losses of parts that is linear in them: a sum, a multiple."""

    def __init__(self, combine: Callable[..., Tensor], *parts: Objective) -> None:
        self.combine = self._alike(combine)
        self.parts = parts
        self.couples_examples = any(part.couples_examples for part in parts)

    @staticmethod
    def _alike(combine: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`combine` of losses that are all of examples, or all of sites."""

        def of_alike(*losses: Tensor) -> Tensor:
            if len({loss.ndim for loss in losses}) > 1:
                shapes = " and ".join(str(list(loss.shape)) for loss in losses)
                raise InputError(
                    f"the parts of a sum of objectives gave losses of shapes {shapes}; expected a loss for each site "
                    "of all of them, or of none: mask= and credit= belong to the call of the estimator"
                )
            return combine(*losses)

        return of_alike

    def __call__(self, codes: Tensor) -> Tensor:
        return self.combine(*(part(codes) for part in self.parts))

    def of_call(self, problem: Problem) -> Objective:
        return Sum(self.combine, *(part.of_call(problem) for part in self.parts))

    def takes_rows(self, codes: Tensor) -> bool:
        return all(part.takes_rows(codes) for part in self.parts)

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.combine(*(part.everywhere(codes, batch) for part in self.parts))

    def shared(self, codes: Tensor, batch: int) -> Tensor | None:
        losses = [part.shared(codes, batch) for part in self.parts]
        return None if any(loss is None for loss in losses) else self.combine(*losses)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return combined(self.combine, [part.curvature(codes, generator=generator) for part in self.parts])

    def evaluate(self, codes: Tensor) -> Evaluation:
        return CombinedEvaluation(self, codes, self.combine, [part.evaluate(codes) for part in self.parts])


Local = TypeVar("Local", bound=Objective)


def with_losses_of_sites(objective: Local) -> Local:
    """A copy of an objective with `loss_axes`, whose losses are `[S, B, T]`."""
    objective = copy.copy(objective)
    objective.loss_axes = 3  # type: ignore[attr-defined]
    return objective


def check_examples(data: int, logits: int) -> None:
    """Make sure that an objective has a loss for each example of a call.

    Raises:
        InputError: they are not as many. A single one would broadcast to a wrong gradient.
    """
    if data != logits:
        raise InputError(f"data of {data} examples for logits of {logits}; expected as many of both")


def as_objective(objective: Objective | CodeLoss) -> Objective:
    """The objective itself, or a callable wrapped into one."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)
