"""What an estimator returns, and what the first half of a one-pass estimator hands to the second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dgrad.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    The `loss` of a relaxation, such as `gumbel-softmax`, is that of relaxed codes, and mostly lower than that of hard
    ones. Compare estimators by the loss of hard codes: `objective(estimate.codes)`.

    Attributes:
        loss: `[B]`, estimates `E_q[f(z)]` for each example; its gradient is the estimator's.
        codes: `[S, B, *code]`, the hard codes that were drawn (for `exact`: the whole support).
    """

    loss: Float[Tensor, " batch"]
    codes: Float[Tensor, "samples batch *code"]


@dataclass(frozen=True)
class Drawn:
    """What the first half of a one-pass estimator returns.

    Attributes:
        codes: `[S, B, *code]`, whose losses the second half needs.
        kept: whatever else it drew, or read from a state that moves; the batch is the second axis of each.
    """

    codes: Float[Tensor, "samples batch *code"]
    kept: tuple[Tensor, ...] = ()


def check_estimate(name: str, estimate: Any, logits: Tensor) -> None:
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
