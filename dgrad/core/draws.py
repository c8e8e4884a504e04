"""Codes that are drawn now and whose losses come later: policies, bandits, episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dgrad.core.estimates import Drawn, Estimate, check_estimate
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.sites import prepare
from dgrad.core.traits import Traits
from dgrad.errors import InputError


@runtime_checkable
class OnePassEstimator(Protocol):
    """What a draw asks of its estimator: see `GradientEstimator`."""

    @property
    def traits(self) -> Traits: ...

    def estimate_from(self, layer: LatentLayer, logits: Tensor, drawn: Drawn, loss: Tensor) -> Estimate: ...


@dataclass(frozen=True, eq=False)
class Draw:
    """Codes that were drawn, to act on now and to learn from later. Made by `estimator.draw(layer, logits)`.

    In an episode, each step has a draw. `Draw.cat` makes one of them, so that one pass of the policy learns from all.
    A draw may be made under `torch.no_grad` or `torch.inference_mode`. Then give `estimate` the logits again.

    Attributes:
        codes: `[S, B, *code]`, or `[S, B, T, *code]` of sequences, in the dtype of the logits. The estimator needs the
            loss of each.
    """

    estimator: OnePassEstimator
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
        problem = prepare(
            self.layer,
            logits,
            mask=None if mask is None else _outside_inference_mode(mask),
            credit=self.credit,
            allowed=None if allowed is None else _outside_inference_mode(allowed),
            local_losses=self.estimator.traits.losses_of_sites,
        )
        if problem.logits.dtype != logits.dtype or not loss.is_floating_point():
            loss = loss.to(problem.logits.dtype)
        drawn = Drawn(_outside_inference_mode(self.drawn.codes), tuple(map(_outside_inference_mode, self.drawn.kept)))
        estimate = self.estimator.estimate_from(problem.layer, problem.logits, drawn, problem.losses(loss))
        check_estimate(f"{type(self.estimator).__name__}.estimate_from", estimate, problem.logits)
        of_examples = problem.nan_where_logits_are(estimate.loss)
        return Estimate(loss=problem.loss(of_examples, loss), codes=problem.codes(estimate.codes))

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
