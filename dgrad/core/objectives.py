"""Objectives: the loss of each example as a function of its code, and how it changes when one coordinate does (the sweep).

May import torch; knows no model and no estimator. An objective is built anew for every batch, around that batch's data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import InputError

CodeLoss = Callable[[Tensor], Tensor]
"""A loss of codes: `[S, B, *code] -> [S, B]`, for any number of samples S."""


class Objective(ABC):
    """The loss of each example as a function of the code: `[S, B, *code] -> [S, B]`.

    Objectives add up (`reconstruction + kl`) and scale (`0.5 * kl`); a sum sweeps each part in that part's own best way.
    """

    @abstractmethod
    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        """The loss of each code, differentiable in the parameters it uses and, where it can be, in the codes."""

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        """The loss of each of `batch` examples at each of these codes, which are the same for all; differentiable as a call is.

        Where nothing but the code enters a decoder it then runs once for each code, not once for each code and example.
        """
        return self(codes.unsqueeze(1).expand(-1, batch, *codes.shape[1:]))

    @abstractmethod
    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        """The loss with row i of the code replaced by `onehot(j)`, for every (i, j); no gradient.

        Args:
            codes: one-hot rows.
            loss: the loss of `codes` itself where the caller has it, which saves one evaluation.
        """

    @torch.no_grad()
    def sweep_rows(
        self,
        codes: Float[Tensor, "samples batch n k"],
        rows: Int[Tensor, "samples batch m"],
        loss: Float[Tensor, "samples batch"] | None = None,
    ) -> Float[Tensor, "samples batch n k"]:
        """The sweep of some rows of each code; in all others stands the loss of the code itself, as if nothing changed it.

        What is written here sweeps all rows and forgets the others; where evaluations are dear, an objective evaluates m(k-1) changed codes.

        Args:
            rows: which; one that comes twice is swept once.
            loss: the loss of `codes` itself where the caller has it.
        """
        loss = self(codes) if loss is None else loss
        swept = torch.zeros(codes.shape[:-1], dtype=torch.bool, device=codes.device).scatter_(-1, rows, True)
        return torch.where(swept.unsqueeze(-1), self.sweep(codes, loss), loss[..., None, None])

    def sweeps_all_rows_at_once(self, codes: Float[Tensor, "samples batch n k"], rows: int) -> bool:
        """Whether the sweep of so many rows of each code costs as much as that of all, so that nothing is gained by leaving some out."""
        return False

    @torch.no_grad()
    def potentials(
        self,
        layer: LatentLayer,
        codes: Float[Tensor, "samples batch *code"],
        loss: Float[Tensor, "samples batch"] | None = None,
    ) -> Float[Tensor, "samples batch *code"]:
        """Potentials `T` that say by how much the loss differs where one variable of the code is changed: `<T, z'> - <T, z> = f(z') - f(z)`.

        For independent rows they are the sweep; other layers say how a variable is changed.

        Args:
            loss: the loss of `codes` itself where the caller has it.
        """
        if layer.independent_rows:
            return self.sweep(codes, loss)
        loss = self(codes) if loss is None else loss
        neighbours = layer.neighbours(codes)  # [C, S, B, *code]
        losses = self(neighbours.flatten(0, 1)).unflatten(0, neighbours.shape[:2])  # [C, S, B]
        return layer.change_potentials(codes, losses - loss)

    def __add__(self, other: Objective) -> Objective:
        return _Sum(self, other)

    def __rmul__(self, weight: float | Tensor) -> Objective:
        return _Scaled(weight, self)


class FunctionObjective(Objective):
    """Any callable as an objective. Its sweep calls it on all changed codes, `codes_per_call` at a time.

    >>> objective = FunctionObjective(lambda codes: codes[..., 0].sum(-1))
    >>> objective.sweep(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    tensor([[[[1., 0.],
              [2., 1.]]]])
    """

    def __init__(self, function: CodeLoss, *, codes_per_call: int = 16384) -> None:
        self.function = function
        self.codes_per_call = codes_per_call

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        loss = self.function(codes)
        if loss.shape != codes.shape[:2]:
            raise InputError(
                f"the objective returned shape {list(loss.shape)} for codes of shape {list(codes.shape)}; expected one loss for each "
                f"code, [samples, batch] = {list(codes.shape[:2])}: sum over everything but the first two axes"
            )
        return loss

    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        samples, batch, n, _ = codes.shape
        return self.sweep_rows(codes, torch.arange(n, device=codes.device).expand(samples, batch, n), loss)

    @torch.no_grad()
    def sweep_rows(self, codes: Tensor, rows: Tensor, loss: Tensor | None = None) -> Tensor:
        samples, batch, n, k = codes.shape
        loss = self(codes) if loss is None else loss
        own = codes.argmax(-1).gather(-1, rows)  # [S, B, m]
        result = loss.detach()[..., None].repeat(1, 1, n * k)  # [S, B, n*k]
        # One change is a place in `rows` and an offset: the row's value moves on by 1 .. k-1, so that its own value is never evaluated again.
        device = codes.device
        changes = torch.cartesian_prod(torch.arange(rows.shape[-1], device=device), torch.arange(1, k, device=device))
        for places, offsets in (
            part.unbind(-1) for part in changes.split(max(1, self.codes_per_call // (samples * batch)))
        ):
            values, of_row = (own[..., places] + offsets) % k, rows[..., places]  # [S, B, c]
            changed = codes.unsqueeze(2).repeat(1, 1, len(places), 1, 1)  # [S, B, c, n, k]
            changed.scatter_(
                3,
                of_row[..., None, None].expand(-1, -1, -1, 1, k),
                F.one_hot(values, k).to(codes.dtype).unsqueeze(3),
            )
            losses = self(changed.movedim(2, 0).reshape(-1, batch, n, k))  # [c*S, B]
            losses = losses.view(len(places), samples, batch).movedim(0, 2).to(result.dtype)  # [S, B, c]
            result.scatter_(-1, of_row * k + values, losses)
        return result.view(samples, batch, n, k)


class KLObjective(Objective):
    """`log q(z) - log p(z)` of the code: the KL moved inside the objective, where an estimator sees the whole bound.

    `log q` carries no gradient to the logits: the mean of `grad log q` is 0, so nothing is lost (and with reparameterised
    codes its variance is saved; Roeder et al. 2017). The sweep is closed-form, because `log q` is linear in the code.
    """

    def __init__(self, layer: LatentLayer, logits: Float[Tensor, "batch *code"]) -> None:
        self.layer = layer
        self.logits = logits.detach()

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        return self.layer.log_prob(self.logits, codes) - self.layer.log_prior

    @torch.no_grad()
    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        loss = self(codes) if loss is None else loss
        return loss[..., None, None] + self.layer.linear_sweep(self.logits, codes)

    def sweeps_all_rows_at_once(self, codes: Tensor, rows: int) -> bool:
        return True

    def potentials(self, layer: LatentLayer, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        if layer.independent_rows:
            return self.sweep(codes, loss)
        # log q is <logits, z> but for a constant: exact whatever is changed, not for one variable alone
        return self.logits.expand_as(codes)


class SharedSweeps(Objective):
    """An objective whose sweeps are kept, so that estimators that draw the same codes share one table.

    `direct`, `direct-rb` and `leg`, each with any epsilon and difference, draw the same codes from the same noise. Looking a table up waits
    for the device: not for training steps.

    Args:
        objective: whose sweeps are kept.
        tables: where, by `name` and codes; to be handed to the next objective of the same losses.
        name: tells objectives of other losses apart.
        most: numbers that the tables may hold together; what comes later is not kept.

    >>> objective, tables = FunctionObjective(lambda codes: codes[..., 0].sum(-1)), {}
    >>> codes = torch.tensor([[[[1.0, 0.0]]]])
    >>> SharedSweeps(objective, tables).sweep(codes) is SharedSweeps(objective, tables).sweep(codes.clone())
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

    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        key = (self.name, codes.shape, codes.argmax(-1).cpu().numpy().tobytes())
        table = self.tables.get(key)
        if table is None:
            table = self.objective.sweep(codes, loss)
            if (len(self.tables) + 1) * table.numel() <= self.most:
                self.tables[key] = table
        return table

    def sweeps_all_rows_at_once(self, codes: Tensor, rows: int) -> bool:
        return self.objective.sweeps_all_rows_at_once(codes, rows)

    def potentials(self, layer: LatentLayer, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.sweep(codes, loss) if layer.independent_rows else self.objective.potentials(layer, codes, loss)


class _Sum(Objective):
    def __init__(self, *parts: Objective) -> None:
        self.parts = parts
        self._losses: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        first, *others = losses = [part(codes) for part in self.parts]
        self._losses = (
            codes,
            [loss.detach() for loss in losses],
        )  # an estimator sweeps the codes that it has just evaluated
        return sum(others, start=first)

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        first, *others = (part.everywhere(codes, batch) for part in self.parts)
        return sum(others, start=first)

    def sweep(self, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        first, *others = (part.sweep(codes, known) for part, known in zip(self.parts, self._known(codes), strict=True))
        return sum(others, start=first)

    def sweep_rows(self, codes: Tensor, rows: Tensor, loss: Tensor | None = None) -> Tensor:
        first, *others = (
            part.sweep_rows(codes, rows, known) for part, known in zip(self.parts, self._known(codes), strict=True)
        )
        return sum(others, start=first)

    def sweeps_all_rows_at_once(self, codes: Tensor, rows: int) -> bool:
        return all(part.sweeps_all_rows_at_once(codes, rows) for part in self.parts)

    def potentials(self, layer: LatentLayer, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        first, *others = (
            part.potentials(layer, codes, known) for part, known in zip(self.parts, self._known(codes), strict=True)
        )
        return sum(others, start=first)

    def _known(self, codes: Tensor) -> Sequence[Tensor | None]:
        """The parts' losses of the codes that were evaluated last, None for other codes."""
        return self._losses[1] if self._losses is not None and self._losses[0] is codes else [None] * len(self.parts)


class _Scaled(Objective):
    def __init__(self, weight: float | Tensor, part: Objective) -> None:
        self.weight = weight
        self.part = part
        self._loss: tuple[Tensor, Tensor] | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        loss = self.part(codes)
        self._loss = (codes, loss.detach())  # an estimator sweeps the codes that it has just evaluated
        return self.weight * loss

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.weight * self.part.everywhere(codes, batch)

    def sweep(self, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.weight * self.part.sweep(codes, self._known(codes))

    def sweep_rows(self, codes: Tensor, rows: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.weight * self.part.sweep_rows(codes, rows, self._known(codes))

    def sweeps_all_rows_at_once(self, codes: Tensor, rows: int) -> bool:
        return self.part.sweeps_all_rows_at_once(codes, rows)

    def potentials(self, layer: LatentLayer, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.weight * self.part.potentials(layer, codes, self._known(codes))

    def _known(self, codes: Tensor) -> Tensor | None:
        return self._loss[1] if self._loss is not None and self._loss[0] is codes else None


class _InDtype(Objective):
    """Hands codes to the inner objective in its own dtype and takes losses back in the caller's."""

    def __init__(self, inner: Objective, dtype: torch.dtype) -> None:
        self.inner = inner
        self.dtype = dtype

    def __call__(self, codes: Tensor) -> Tensor:
        return self.inner(codes.to(self.dtype)).to(codes.dtype)

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes.to(self.dtype), batch).to(codes.dtype)

    def sweep(self, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.inner.sweep(codes.to(self.dtype)).to(codes.dtype)

    def sweep_rows(self, codes: Tensor, rows: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.inner.sweep_rows(codes.to(self.dtype), rows).to(codes.dtype)

    def sweeps_all_rows_at_once(self, codes: Tensor, rows: int) -> bool:
        return self.inner.sweeps_all_rows_at_once(codes, rows)

    def potentials(self, layer: LatentLayer, codes: Tensor, loss: Tensor | None = None) -> Tensor:
        return self.inner.potentials(layer, codes.to(self.dtype)).to(codes.dtype)


def as_objective(objective: Objective | CodeLoss) -> Objective:
    """The objective itself, or a callable wrapped into one."""
    return objective if isinstance(objective, Objective) else FunctionObjective(objective)


def in_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    """`objective`, evaluated on codes of `dtype` whatever the dtype of the codes that it is given."""
    return _InDtype(objective, dtype)
