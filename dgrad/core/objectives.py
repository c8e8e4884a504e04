"""Objectives: the loss of each example as a function of its code, and its sweep.

The sweep is the loss with one coordinate of the code changed, for every coordinate. An objective is built anew for
every batch, around that batch's data. It knows no model and no estimator.
"""

from __future__ import annotations

import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.core.curvature import EXAMPLES, Curvature, combined, mean_of_products, random_signs
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_inference_mode, needs_transforms, without_gradient
from dgrad.core.objective_guards import (
    BatchNormError,
    agree,
    check_dependence,
    identity_of,
    refusing_batch_norm,
    warn_if_expensive,
)
from dgrad.core.random import RandomState
from dgrad.core.restricted import visible
from dgrad.core.sites import prepare
from dgrad.errors import InputError
from dgrad.kernels import numerics

CodeLoss = Callable[[Tensor], Tensor]
"""A loss of codes: `[S, B, *code] -> [S, B]`, for any number of samples S."""
IndexLoss = Callable[[Tensor], Tensor]
"""A loss of the compact integer form of codes: int64 `[S, B, n] -> [S, B]`."""
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
        products = at.hessian_times(signs)  # [1, B, n, k]
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


class Evaluation:
    """Codes that were evaluated: their loss, and how it changes. Made by `objective.at(codes)`.

    A subclass keeps what its loss and its sweep have in common, and overrides `sweep`, or `changed` where only the
    changed codes are cheaper. No gradient flows through a sweep.

    Attributes:
        objective: the objective that was evaluated.
        codes: `[S, B, *code]`.
        loss: `[S, B]`, differentiable as a call of the objective is.
        noise: the random numbers that the loss was evaluated with, where it drew any. A sweep sees the same.
    """

    allowed: Tensor | None = None
    """Bool, broadcasts against one-hot codes: the values that a sweep evaluates. None for all."""
    vectorises = True
    """Whether `torch.func.vmap` is still worth a try."""

    def __init__(
        self,
        objective: Objective,
        codes: Float[Tensor, "samples #batch *code"],
        loss: Float[Tensor, "samples batch"],
        noise: RandomState | None = None,
    ) -> None:
        self.objective = objective
        self.codes = codes
        self.loss = loss
        self.noise = noise

    def restrict(self, allowed: Tensor) -> None:
        """Evaluate no forbidden value in a sweep by calls. Where it is in the table, anything may stand.

        An evaluation that is made of others hands it on.
        """
        self.allowed = allowed

    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        """The loss with row i of the code replaced by `onehot(j)`, for every (i, j)."""
        samples, batch, n, _ = self.codes.shape
        return self.changed(torch.arange(n, device=self.codes.device).expand(samples, batch, n))

    @without_gradient
    def sweep_rows(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        """The sweep of some rows of each code. All other rows hold the loss of the code, as if nothing changed it.

        Args:
            rows: a row that comes twice is swept once.
        """
        return self._masked(rows) if self.full_sweep_is_free(rows.shape[-1]) else self.changed(rows)

    @without_gradient
    def _masked(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        """The same from the sweep of all rows."""
        swept = torch.zeros(self.codes.shape[:-1], dtype=torch.bool, device=rows.device).scatter_(-1, rows, True)
        return torch.where(swept.unsqueeze(-1), self.sweep(), self.loss[..., None, None])

    def full_sweep_is_free(self, rows: int) -> bool:
        """Whether the sweep of all rows costs no more than that of `rows` of them."""
        return False

    @without_gradient
    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        """Potentials `T` of changing one variable of the code: `<T, z'> - <T, z> = f(z') - f(z)`.

        For one-hot rows they are the sweep. Other layers say how a variable is changed: `layer.moves`.
        """
        if layer.one_hot_rows:
            return self.sweep()
        if layer.moves is None:
            raise InputError(f"{layer} does not say how one variable of a code is changed; expected a layer with moves")
        neighbours = layer.moves.neighbours(self.codes)  # [C, S, B, *code]
        warn_if_expensive(len(neighbours), *self.objective.cost_advice)
        losses = self.losses_of(neighbours)  # [C, S, B]
        return layer.moves.potentials(self.codes, losses - self.loss)

    def slope(self, *, differentiable: bool = False) -> Float[Tensor, "samples batch *code"]:
        """The gradient of the loss in the codes. Zeros in `torch.inference_mode`.

        Args:
            differentiable: whether it has a gradient of its own.

        Raises:
            InputError: the codes were not evaluated with `differentiable=True`.
        """
        if in_inference_mode():  # no graph is recorded, and whoever calls has no use for gradients
            return torch.zeros_like(self.codes)
        if needs_transforms():
            return torch.func.grad(lambda codes: self.objective(codes).sum())(self.codes.detach())
        if not self.codes.requires_grad:
            raise InputError("slope() of codes evaluated by at(codes); expected at(codes, differentiable=True)")
        if not self.loss.requires_grad:
            raise InputError(
                "the objective has no gradient in the codes, and this estimator differentiates it; expected a loss "
                "that is computed from the codes by differentiable operations: or take rloo, or direct"
            )
        with torch.enable_grad():
            total = self.loss.sum()
        (slope,) = torch.autograd.grad(total, self.codes, retain_graph=True, create_graph=differentiable)
        return slope

    def hessian_times(self, vectors: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch *code"]:
        """The second derivative of each code's loss, times a vector. Zeros in `torch.inference_mode`.

        Raises:
            InputError: as for `slope`.
        """
        if needs_transforms():
            slope = torch.func.grad(lambda codes: self.objective(codes).sum())
            return torch.func.grad(lambda codes: (slope(codes) * vectors).sum())(self.codes.detach())
        slope_here = self.slope(differentiable=True)
        if not slope_here.requires_grad:  # linear, or in inference mode
            return torch.zeros_like(vectors)
        (products,) = torch.autograd.grad(slope_here, self.codes, vectors, materialize_grads=True)
        return products

    def losses_of(self, changed: Tensor) -> Float[Tensor, "changes samples batch"]:
        """The losses of changed codes `[C, S, B, *code]`, with the random numbers of the codes themselves."""
        if self.noise is None:
            return self.objective(changed.flatten(0, 1)).unflatten(0, changed.shape[:2])
        return self.with_same_noise(self.objective, changed, self.codes)

    def with_same_noise(
        self, function: Callable[[Tensor], Tensor], changed: Tensor, own: Tensor
    ) -> Float[Tensor, "changes samples batch"]:
        """What a function gives for each of the changed inputs, with the random numbers of the codes themselves.

        One call with `torch.func.vmap` where that gives the codes' own loss again, else a call for each change.

        Args:
            changed: the function's inputs, `[C, S, B, *inputs]`.
            own: its inputs for the codes themselves, `[S, B, *inputs]`.
        """
        assert self.noise is not None
        if self.vectorises and changed.device.type == "cpu":
            one_mask = torch.func.vmap(function, randomness="same")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # vmap warns where it would be slow
                    losses = self.noise.again(one_mask, torch.cat([own.unsqueeze(0), changed]))
                if agree(losses[0], self.loss):
                    return losses[1:]
            except Exception:  # whatever vmap cannot do
                pass
            self.vectorises = False
        return torch.stack([self.noise.again(function, inputs) for inputs in changed])

    @without_gradient
    def changed(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        """The sweep of some rows by evaluating every changed code: behind `sweep` and `sweep_rows` by default.

        The codes of one variable are the same for all examples. Where the objective can share their evaluations, the
        batch needs k of them.
        """
        codes = self.codes
        samples, batch, n, k = codes.shape
        own = codes.argmax(-1)  # [S, B, n]
        sharable = n == 1 and self.noise is None and self.allowed is None
        if sharable and (shared := self._shared(own)) is not None:
            return shared
        warn_if_expensive(rows.shape[-1] * (k - 1), *self.objective.cost_advice)
        own = own.gather(-1, rows)  # [S, B, m]
        result = self.loss.detach()[..., None].repeat(1, 1, n * k)  # [S, B, n*k]
        # A change is an index into `rows` and an offset from 1 to k-1: a row's own value is not evaluated again.
        device, per_call = codes.device, self.objective.changes_per_call(codes, samples * batch)
        changes = torch.cartesian_prod(torch.arange(rows.shape[-1], device=device), torch.arange(1, k, device=device))
        indices, offsets = changes.unbind(-1)
        all_values, all_rows = (own[..., indices] + offsets) % k, rows[..., indices]  # [S, B, C]
        if self.allowed is not None:
            all_values, all_rows = _allowed_changes(
                all_values, all_rows, own[..., indices], self.allowed.expand_as(codes)
            )
        guard = refusing_batch_norm()
        for values, of_row in zip(all_values.split(per_call, -1), all_rows.split(per_call, -1), strict=True):
            with guard:
                losses = self.losses_of(self.replaced(of_row.movedim(-1, 0), values.movedim(-1, 0)))  # [c, S, B]
            guard = nullcontext()  # the first call shows which modules there are
            result.scatter_(-1, of_row * k + values, losses.movedim(0, -1).to(result.dtype))
        return result.view(samples, batch, n, k)

    def replaced(
        self, rows: Int[Tensor, "changes samples batch"], values: Int[Tensor, "changes samples batch"]
    ) -> Tensor:
        """Each code with one row set to a value, `[C, S, B, n, k]`."""
        changed = self.codes.expand(len(rows), *self.codes.shape).clone()
        one_hot = numerics.one_hot(values, self.codes.shape[-1], changed.dtype)
        return changed.scatter_(3, rows[..., None, None].expand(-1, -1, -1, 1, changed.shape[-1]), one_hot.unsqueeze(3))

    def shared_values(self, values: Int[Tensor, " values"]) -> Float[Tensor, "values batch"] | None:
        """The loss of each example with its one variable at each of these values, or None: see `Objective.shared`."""
        codes = numerics.one_hot(values, self.codes.shape[-1], self.codes.dtype).unsqueeze(1)
        return self.objective.shared(codes, self.codes.shape[1])

    def _shared(self, own: Int[Tensor, "samples batch 1"]) -> Float[Tensor, "samples batch 1 k"] | None:
        """The sweep of one variable from k evaluations for the batch, or None."""
        samples, batch, _, k = self.codes.shape
        parts = []
        for values in torch.arange(k, device=own.device).split(self.objective.changes_per_call(self.codes, batch)):
            with refusing_batch_norm():
                losses = self.shared_values(values)
            if losses is None:
                return None
            parts.append(losses.to(self.loss.dtype))
        table = torch.cat(parts).T.expand(samples, -1, -1)  # [S, B, k]
        loss = self.loss.detach().unsqueeze(-1)  # [S, B, 1]
        if not agree(table.gather(-1, own), loss):
            return None
        return table.scatter(-1, own, loss).unsqueeze(2)


def _allowed_changes(values: Tensor, rows: Tensor, own: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Of changes `[S, B, C]` to `values` of `rows`, the allowed ones: as many as the code with the most has.

    The other codes have some changes to their own value on top, which change nothing.
    """
    k = allowed.shape[-1]
    fine = allowed.flatten(-2).gather(-1, rows * k + values)
    order = fine.int().argsort(dim=-1, descending=True, stable=True)
    counts = visible(fine.sum(-1))
    if counts is not None:
        order = order[..., : counts.max(initial=0)]
    return torch.where(fine, values, own).gather(-1, order), rows.gather(-1, order)


def _floating(loss: Tensor, inputs: Tensor) -> Tensor:
    """The loss in a floating dtype: counts and booleans have no gradient, and sums of them no mean."""
    return loss if loss.is_floating_point() else loss.to(torch.promote_types(inputs.dtype, torch.float32))


_LOSSES = {
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

    def loss_of(self, inputs: Tensor) -> Float[Tensor, "samples batch *sites"]:
        """The function's result for codes, in the form in which the function takes them."""
        loss, shape = self.function(inputs), inputs.shape[: self.loss_axes]
        if not isinstance(loss, Tensor) or loss.shape != shape:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            each, axes, remedy = _LOSSES[self.loss_axes]
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


class IndexObjective(FunctionObjective):
    """A function of the compact integer form of codes, int64 `[S, B, n]` for one-hot rows: lookups, experts, attention.

    Its sweep builds no one-hot codes. A sweep of one variable hands over all k values at once.

    Args:
        layer: whose `indices` the function takes; None for one-hot rows.

    >>> table = torch.tensor([5.0, 7.0, 9.0])
    >>> IndexObjective(lambda indices: table[indices].sum(-1)).at(torch.tensor([[[[0.0, 1.0, 0.0]]]])).sweep()
    tensor([[[[5., 7., 9.]]]])
    """

    least_bytes = 64

    def __init__(self, function: IndexLoss, *, layer: LatentLayer | None = None, **options: Any) -> None:
        super().__init__(function, **options)
        self.layer = layer

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        return identity_of(self.function), ["fewer variables"]

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        """What the function gets for these codes."""
        return codes.argmax(-1) if self.layer is None else self.layer.indices(codes)

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        if codes.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "an objective of indices has no gradient in the codes, and this estimator differentiates it; expected "
                "a loss of the codes themselves, or an estimator that evaluates hard codes, such as direct-rb, leg or "
                "rloo"
            )
        return self.loss_of(self.indices(codes))

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self._everywhere(self.indices(codes), batch)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        return self.shared_indices(self.indices(codes), batch)

    def shared_indices(self, indices: Int[Tensor, "codes *n"], batch: int) -> Float[Tensor, "codes batch"]:
        """The loss of each example at indices that all share, from one call."""
        losses = self._shared(indices, batch)
        return self.loss_of(indices.unsqueeze(1).expand(-1, batch, -1)) if losses is None else losses

    def changes_per_call(self, codes: Tensor, count: int) -> int:
        return super().changes_per_call(codes[..., 0], count)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        state = RandomState(codes.device)
        loss = self(codes)
        evaluation = Evaluation if self.layer is not None and not self.layer.one_hot_rows else _IndexEvaluation
        return evaluation(self, codes, loss, state if state.has_moved() else None)


class _IndexEvaluation(Evaluation):
    """One-hot rows as indices: changed codes are `[C, S, B, n]`."""

    objective: IndexObjective

    def replaced(self, rows: Tensor, values: Tensor) -> Tensor:
        own = self.codes.argmax(-1)
        return own.expand(len(rows), *own.shape).scatter(-1, rows.unsqueeze(-1), values.unsqueeze(-1))

    def losses_of(self, changed: Tensor) -> Float[Tensor, "changes samples batch"]:
        if self.noise is None:
            return self.objective.loss_of(changed.flatten(0, 1)).unflatten(0, changed.shape[:2])
        return self.with_same_noise(self.objective.loss_of, changed, self.codes.argmax(-1))

    def shared_values(self, values: Int[Tensor, " values"]) -> Float[Tensor, "values batch"]:
        return self.objective.shared_indices(values.unsqueeze(-1), self.codes.shape[1])


class KLObjective(Objective):
    """`log q(z) - log p(z)` of the code: the KL inside the objective, where an estimator sees the whole bound.

    `log q` carries no gradient to the logits: the mean of `grad log q` is 0. With reparameterised codes this saves
    variance (Roeder et al. 2017). The sweep is closed-form, because `log q` is linear in the code.
    """

    def __init__(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        *,
        mask: Tensor | None = None,
        allowed: Tensor | None = None,
        credit: str = "example",
    ) -> None:
        self.problem = prepare(layer, logits.detach(), mask=mask, allowed=allowed, credit=credit, local_losses=True)
        self.layer = self.problem.layer
        self.logits = self.problem.logits.to(logits.dtype)

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        log_prior = self.layer.log_prior
        if isinstance(log_prior, Tensor):
            log_prior = log_prior.to(self.logits.dtype)
        loss = self.layer.log_prob(self.logits, self.problem.folded_codes(codes)) - log_prior
        return loss.unflatten(-1, (-1, self.problem.sites or 1)) if self.problem.folded else loss

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self(codes.unsqueeze(1))

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        if codes.shape[2:] != self.layer.shape:  # of sequences
            return super().evaluate(codes)
        return _KLEvaluation(self, codes, self(codes))

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        if codes.shape[2:] != self.layer.shape:  # of sequences
            return super().curvature(codes, generator=generator)
        nothing = codes.new_zeros(0, *codes.shape[2:])
        return Curvature(nothing, nothing)  # linear

    def takes_rows(self, codes: Float[Tensor, "samples batch sites n k"]) -> bool:
        return self.layer.one_hot_rows and not self.problem.folded


class _KLEvaluation(Evaluation):
    objective: KLObjective

    @without_gradient
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        return self.loss[..., None, None] + self.objective.layer.linear_sweep(self.objective.logits, self.codes)

    def full_sweep_is_free(self, rows: int) -> bool:
        return True

    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        if layer.one_hot_rows:
            return self.sweep()
        # log q is <logits, z> but for a constant: exact whatever is changed, not for one variable alone
        return self.objective.logits.expand_as(self.codes)


class SweepCache(Objective):
    """An objective whose sweeps are kept, so that estimators that draw the same codes share one table.

    `direct`, `direct-rb` and `leg` draw the same codes from the same noise, whatever their epsilon and difference.
    Looking a table up waits for the device: it is not for training steps.

    Args:
        objective: the objective that is swept.
        tables: where the sweeps are kept, by `name` and codes. Hand them to the next objective of the same losses.
        name: tells objectives of other losses apart.
        most: how many numbers the tables may hold together. Later tables are not kept.

    >>> objective, tables = FunctionObjective(lambda codes: codes[..., 0].sum(-1)), {}
    >>> codes = torch.tensor([[[[1.0, 0.0]]]])
    >>> SweepCache(objective, tables).sweep(codes) is SweepCache(objective, tables).sweep(codes.clone())
    True
    """

    def __init__(
        self, objective: Objective, tables: dict[Hashable, Tensor], name: Hashable = None, *, most: int = 2**27
    ) -> None:
        self.objective = objective
        self.couples_examples = objective.couples_examples
        self.tables = tables
        self.name = name
        self.most = most

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        return self.objective(codes)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self.objective.everywhere(codes, batch)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        return self.objective.shared(codes, batch)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.objective.curvature(codes, generator=generator)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        return _CachedEvaluation(self, self.objective.evaluate(codes))


class _CachedEvaluation(Evaluation):
    objective: SweepCache

    def __init__(self, objective: SweepCache, inner: Evaluation) -> None:
        super().__init__(objective, inner.codes, inner.loss)
        self.inner = inner

    def restrict(self, allowed: Tensor) -> None:
        self.inner.restrict(allowed)

    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        cache = self.objective
        key = (cache.name, self.codes.shape, self.codes.argmax(-1).cpu().numpy().tobytes())
        table = cache.tables.get(key)
        if table is None:
            table = self.inner.sweep()
            if (len(cache.tables) + 1) * table.numel() <= cache.most:
                cache.tables[key] = table
        return table

    def sweep_rows(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        return self._masked(rows)

    def full_sweep_is_free(self, rows: int) -> bool:
        return self.inner.full_sweep_is_free(rows)

    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        return self.sweep() if layer.one_hot_rows else self.inner.potentials(layer)


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
                    "of all of them, or of none: dgrad.KLObjective takes mask= and credit= too"
                )
            return combine(*losses)

        return of_alike

    def __call__(self, codes: Tensor) -> Tensor:
        return self.combine(*(part(codes) for part in self.parts))

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
        return _SumEvaluation(self, codes, self.combine, [part.evaluate(codes) for part in self.parts])


class _SumEvaluation(Evaluation):
    """The same function of the parts' losses, sweeps and potentials."""

    def __init__(
        self, objective: Objective, codes: Tensor, combine: Callable[..., Tensor], parts: list[Evaluation]
    ) -> None:
        super().__init__(objective, codes, combine(*(part.loss for part in parts)))
        self.combine = combine
        self.parts = parts

    def restrict(self, allowed: Tensor) -> None:
        for part in self.parts:
            part.restrict(allowed)

    @without_gradient
    def sweep(self) -> Tensor:
        return self.combine(*(part.sweep() for part in self.parts))

    @without_gradient
    def sweep_rows(self, rows: Tensor) -> Tensor:
        return self.combine(*(part.sweep_rows(rows) for part in self.parts))

    def full_sweep_is_free(self, rows: int) -> bool:
        return all(part.full_sweep_is_free(rows) for part in self.parts)

    @without_gradient
    def potentials(self, layer: LatentLayer) -> Tensor:
        return self.combine(*(part.potentials(layer) for part in self.parts))


class _InDtype(Objective):
    """Hands codes to the inner objective in its own dtype and takes losses back in the caller's."""

    def __init__(self, inner: Objective, dtype: torch.dtype) -> None:
        self.inner = inner
        self.dtype = dtype
        self.couples_examples = inner.couples_examples

    def __call__(self, codes: Tensor) -> Tensor:
        return self.inner(codes.to(self.dtype)).to(codes.dtype)

    def takes_rows(self, codes: Tensor) -> bool:
        return self.inner.takes_rows(codes.to(self.dtype))

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes.to(self.dtype), batch).to(codes.dtype)

    def shared(self, codes: Tensor, batch: int) -> Tensor | None:
        losses = self.inner.shared(codes.to(self.dtype), batch)
        return None if losses is None else losses.to(codes.dtype)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.inner.curvature(codes.to(self.dtype), generator=generator).to(codes.dtype)

    def evaluate(self, codes: Tensor) -> Evaluation:
        inner = self.inner.evaluate(codes.to(self.dtype))
        return _SumEvaluation(self, codes, lambda losses: losses.to(codes.dtype), [inner])


class _Differentiated(Objective):
    """The same objective, for an estimator that differentiates it in the codes: it refuses a loss that ignores them."""

    def __init__(self, inner: Objective, name: str) -> None:
        self.inner = inner
        self.name = name
        self.couples_examples = inner.couples_examples

    def __call__(self, codes: Tensor) -> Tensor:
        loss = self.inner(codes)
        check_dependence(loss, codes, self.name)
        return loss

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes, batch)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.inner.curvature(codes, generator=generator)

    def evaluate(self, codes: Tensor) -> Evaluation:
        inner = self.inner.evaluate(codes)
        check_dependence(inner.loss, codes, self.name)
        return inner


def as_objective(objective: Objective | CodeLoss) -> Objective:
    """The objective itself, or a callable wrapped into one."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)


def in_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    """`objective`, evaluated on codes of `dtype` whatever the dtype of the codes that it is given."""
    return _InDtype(objective, dtype)


def differentiated(objective: Objective, name: str) -> Objective:
    """`objective`, as the estimator of this name differentiates it: an InputError where its loss ignores the codes."""
    return _Differentiated(objective, name)
