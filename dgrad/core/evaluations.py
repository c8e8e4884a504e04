"""Evaluated codes: their loss, and how it changes where one variable of a code changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_inference_mode, needs_transforms, without_gradient
from dgrad.core.objective_guards import agree, refusing_batch_norm, warn_if_expensive
from dgrad.core.random import RandomState
from dgrad.core.restricted import visible
from dgrad.errors import InputError
from dgrad.kernels import numerics


@runtime_checkable
class Evaluable(Protocol):
    """What an evaluation asks of its objective: see `Objective`."""

    @property
    def cost_advice(self) -> tuple[object, list[str]]: ...

    def __call__(self, codes: Tensor, /) -> Tensor: ...

    def shared(self, codes: Tensor, batch: int) -> Tensor | None: ...

    def changes_per_call(self, codes: Tensor, count: int) -> int: ...


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
        objective: Evaluable,
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
        """`sweep_rows` by the sweep of all rows."""
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


class CombinedEvaluation(Evaluation):
    """The evaluation of an objective whose loss is a linear function of other losses."""

    def __init__(
        self, objective: Evaluable, codes: Tensor, combine: Callable[..., Tensor], parts: list[Evaluation]
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
