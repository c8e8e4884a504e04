"""Objectives: the loss of each example as a function of its code, and its sweep.

The sweep is the loss with one coordinate of the code changed, for every coordinate. An objective is built anew for
every batch, around that batch's data. It knows no model and no estimator.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_inference_mode, needs_transforms, without_gradient
from dgrad.errors import InputError
from dgrad.kernels import numerics

CodeLoss = Callable[[Tensor], Tensor]
"""A loss of codes: `[S, B, *code] -> [S, B]`, for any number of samples S."""


class Objective(ABC):
    """The loss of each example as a function of the code: `[S, B, *code] -> [S, B]`.

    An objective of your own defines `__call__`. Every changed code is then evaluated by a call. An objective with a
    faster sweep also overrides `evaluate`, to return an `Evaluation` of its own.

    Objectives add up (`reconstruction + kl`) and scale (`0.5 * kl`). A sum sweeps each part in that part's own best
    way.
    """

    codes_per_call = 16384
    """How many changed codes, over the batch, a sweep hands to one call: a bound on memory."""

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
        return Evaluation(self, codes, self(codes))

    def sweep(self, codes: Float[Tensor, "samples batch n k"]) -> Float[Tensor, "samples batch n k"]:
        """The sweep of one-hot rows where nothing else is asked about them: `at(codes).sweep()`."""
        with torch.no_grad():
            return self.evaluate(codes).sweep()

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        """The loss of each of `batch` examples at each of these codes, differentiable as a call is.

        The codes are the same for all examples. Where nothing but the code enters a decoder, it runs once for each
        code.
        """
        return self(codes.unsqueeze(1).expand(-1, batch, *codes.shape[1:]))

    def __add__(self, other: Objective) -> Objective:
        return _Combined(operator.add, self, other)

    def __rmul__(self, weight: float | Tensor) -> Objective:
        return _Combined(lambda loss: weight * loss, self)


class Evaluation:
    """Codes that were evaluated: their loss, and how it changes. Made by `objective.at(codes)`.

    A subclass keeps what its loss and its sweep have in common, and overrides `sweep`, or `changed` where only the
    changed codes are cheaper. No gradient flows through a sweep.

    Attributes:
        objective: the objective that was evaluated.
        codes: `[S, B, *code]`.
        loss: `[S, B]`, differentiable as a call of the objective is.
    """

    def __init__(
        self,
        objective: Objective,
        codes: Float[Tensor, "samples #batch *code"],
        loss: Float[Tensor, "samples batch"],
    ) -> None:
        self.objective = objective
        self.codes = codes
        self.loss = loss

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
        losses = self.objective(neighbours.flatten(0, 1)).unflatten(0, neighbours.shape[:2])  # [C, S, B]
        return layer.moves.potentials(self.codes, losses - self.loss)

    def slope(self) -> Float[Tensor, "samples batch *code"]:
        """The gradient of the loss in the codes. It has no gradient of its own. Zeros in `torch.inference_mode`.

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
        (slope,) = torch.autograd.grad(total, self.codes, retain_graph=True)
        return slope

    @without_gradient
    def changed(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        """The sweep of some rows by evaluating every changed code: behind `sweep` and `sweep_rows` by default."""
        codes = self.codes
        samples, batch, n, k = codes.shape
        own = codes.argmax(-1).gather(-1, rows)  # [S, B, m]
        result = self.loss.detach()[..., None].repeat(1, 1, n * k)  # [S, B, n*k]
        # A change is an index into `rows` and an offset from 1 to k-1: a row's own value is not evaluated again.
        device = codes.device
        changes = torch.cartesian_prod(torch.arange(rows.shape[-1], device=device), torch.arange(1, k, device=device))
        for part in changes.split(max(1, self.objective.codes_per_call // (samples * batch))):
            indices, offsets = part.unbind(-1)
            values, of_row = (own[..., indices] + offsets) % k, rows[..., indices]  # [S, B, c]
            changed = codes.unsqueeze(2).repeat(1, 1, len(indices), 1, 1)  # [S, B, c, n, k]
            one_hot = numerics.one_hot(values, k, codes.dtype).unsqueeze(3)
            changed.scatter_(3, of_row[..., None, None].expand(-1, -1, -1, 1, k), one_hot)
            losses = self.objective(changed.movedim(2, 0).reshape(-1, batch, n, k))  # [c*S, B]
            losses = losses.view(len(indices), samples, batch).movedim(0, 2).to(result.dtype)  # [S, B, c]
            result.scatter_(-1, of_row * k + values, losses)
        return result.view(samples, batch, n, k)


class FunctionObjective(Objective):
    """Any callable as an objective. Its sweep calls it on all changed codes, `codes_per_call` at a time.

    >>> objective = FunctionObjective(lambda codes: codes[..., 0].sum(-1))
    >>> at = objective.at(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    >>> at.loss
    tensor([[1.]])
    >>> at.sweep()
    tensor([[[[1., 0.],
              [2., 1.]]]])
    """

    def __init__(self, function: CodeLoss, *, codes_per_call: int = Objective.codes_per_call) -> None:
        self.function = function
        self.codes_per_call = codes_per_call

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        loss = self.function(codes)
        if loss.shape != codes.shape[:2]:
            raise InputError(
                f"the objective returned shape {list(loss.shape)} for codes of shape {list(codes.shape)}; expected one "
                f"loss for each code, [samples, batch] = {list(codes.shape[:2])}: sum over everything but the first "
                "two axes"
            )
        # Counts and booleans have no gradient, and sums of them no mean.
        return loss if loss.is_floating_point() else loss.to(torch.promote_types(codes.dtype, torch.float32))


class KLObjective(Objective):
    """`log q(z) - log p(z)` of the code: the KL inside the objective, where an estimator sees the whole bound.

    `log q` carries no gradient to the logits: the mean of `grad log q` is 0. With reparameterised codes this saves
    variance (Roeder et al. 2017). The sweep is closed-form, because `log q` is linear in the code.
    """

    def __init__(self, layer: LatentLayer, logits: Float[Tensor, "batch *code"]) -> None:
        self.layer = layer
        self.logits = logits.detach()

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        return self.layer.log_prob(self.logits, codes) - self.layer.log_prior

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        return _KLEvaluation(self, codes, self(codes))


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
        self.tables = tables
        self.name = name
        self.most = most

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        return self.objective(codes)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self.objective.everywhere(codes, batch)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        return _CachedEvaluation(self, self.objective.evaluate(codes))


class _CachedEvaluation(Evaluation):
    objective: SweepCache

    def __init__(self, objective: SweepCache, inner: Evaluation) -> None:
        super().__init__(objective, inner.codes, inner.loss)
        self.inner = inner

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


class _Combined(Objective):
    """A function of the losses of parts that is linear in them: a sum, a multiple."""

    def __init__(self, combine: Callable[..., Tensor], *parts: Objective) -> None:
        self.combine = combine
        self.parts = parts

    def __call__(self, codes: Tensor) -> Tensor:
        return self.combine(*(part(codes) for part in self.parts))

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.combine(*(part.everywhere(codes, batch) for part in self.parts))

    def evaluate(self, codes: Tensor) -> Evaluation:
        return _CombinedEvaluation(self, codes, self.combine, [part.evaluate(codes) for part in self.parts])


class _CombinedEvaluation(Evaluation):
    """The same function of the parts' losses, sweeps and potentials."""

    def __init__(
        self, objective: Objective, codes: Tensor, combine: Callable[..., Tensor], parts: list[Evaluation]
    ) -> None:
        super().__init__(objective, codes, combine(*(part.loss for part in parts)))
        self.combine = combine
        self.parts = parts

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

    def __call__(self, codes: Tensor) -> Tensor:
        return self.inner(codes.to(self.dtype)).to(codes.dtype)

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes.to(self.dtype), batch).to(codes.dtype)

    def evaluate(self, codes: Tensor) -> Evaluation:
        inner = self.inner.evaluate(codes.to(self.dtype))
        return _CombinedEvaluation(self, codes, lambda losses: losses.to(codes.dtype), [inner])


def as_objective(objective: Objective | CodeLoss) -> Objective:
    """The objective itself, or a callable wrapped into one."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)


def in_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    """`objective`, evaluated on codes of `dtype` whatever the dtype of the codes that it is given."""
    return _InDtype(objective, dtype)
