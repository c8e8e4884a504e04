"""Checks of an objective: one independent loss for each example, of the code that it is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objective_guards import BatchNormError, agree, check_dependence, refusing_batch_norm
from dgrad.core.objectives import CodeLoss, Objective, as_objective
from dgrad.core.random import RandomState
from dgrad.errors import InputError

SAMPLES = 4
"""Codes of each example that are tried."""


class ObjectiveError(AssertionError):
    """An objective failed checks; the text has a line for each."""


class _Trial:
    """An objective and codes `[S, B, *code]`; every evaluation draws the same random numbers."""

    def __init__(self, objective: Objective, codes: Tensor, differentiable: bool) -> None:
        self.objective = objective
        self.codes = codes
        self.differentiable = differentiable
        self.state = RandomState(codes.device)

    def loss(self, codes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.state.again(self.objective, codes).cpu()

    def draws(self) -> bool:
        """Whether the objective draws random numbers from torch's own generator."""
        state = RandomState(self.codes.device)
        self.objective(self.codes)
        return state.has_moved()


def check_objective(
    objective: Objective | CodeLoss,
    layer: LatentLayer,
    batch: int,
    *,
    differentiable: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Check that an objective is one independent loss for each example, of the code that it is given.

    It evaluates the objective about 20 times, at random codes. It finds coupled examples by changing the codes of the
    others. It also finds losses of the wrong shape, losses that ignore the code (of actions that were already taken),
    losses that change from call to call, BatchNorm in training mode, and samples that change each other's loss.

    Args:
        objective: a function of codes, `[S, B, *code] -> [S, B]`, or an objective. With `couples_examples` it may
            couple them.
        batch: how many examples its data have.
        differentiable: whether to check that the loss has a gradient in the codes.
        dtype, device: of the codes.

    Raises:
        InputError: there is no example, or the layer is none.
        ObjectiveError: something is wrong; the text has a line for each failure.

    >>> import dgrad
    >>> check_objective(lambda codes: codes[..., 0].sum(-1), dgrad.latent("2x3"), batch=4)
    """
    if not isinstance(layer, LatentLayer):
        raise InputError(f'the layer is a {type(layer).__name__}; expected a latent layer: dgrad.latent("20x10")')
    if batch < 1:
        raise InputError(f"batch must be at least 1; got {batch}")
    objective = as_objective(objective)
    generator = Generator(device).manual_seed(0)
    logits = torch.zeros(batch, *layer.shape, dtype=dtype, device=device)
    trial = _Trial(objective, layer.sample(logits, SAMPLES, generator=generator), differentiable)
    unusable = _outcome(_shapes, trial) or _outcome(_finite_values, trial)  # then nothing else can be asked
    failures = [unusable] if unusable else [_outcome(check, trial) for check in _CHECKS]
    if any(failures):
        raise ObjectiveError("\n".join(["the objective fails checks:", *filter(None, failures)]))


def _outcome(check: Callable[[_Trial], str | None], trial: _Trial) -> str | None:
    try:
        failure = check(trial)
    except InputError as error:
        failure = str(error)
    except Exception as error:  # whatever a stranger's function raises
        failure = f"it raises {type(error).__name__}: {' '.join(str(error).split())}"
    return failure and f"  {check.__name__.strip('_').replace('_', ' ')}: {failure}"


def _shapes(trial: _Trial) -> str | None:
    for samples in (1, SAMPLES):
        codes = trial.codes[:samples]
        loss = trial.loss(codes)
        if loss.shape != codes.shape[:2]:
            return (
                f"it returns shape {list(loss.shape)} for codes of shape {list(codes.shape)}; expected "
                f"{list(codes.shape[:2])}"
            )
    return None


def _finite_values(trial: _Trial) -> str | None:
    return None if trial.loss(trial.codes).isfinite().all() else "a loss is not finite"


def _batch_norm(trial: _Trial) -> str | None:
    try:
        with refusing_batch_norm():
            trial.loss(trial.codes)
    except BatchNormError as error:
        return str(error)
    return None


def _repeatable(trial: _Trial) -> str | None:
    if torch.equal(trial.loss(trial.codes), trial.loss(trial.codes)):
        return None
    return (
        "the same codes have another loss in the next call; expected a loss that keeps no state, and random numbers "
        "from torch's own generator"
    )


def _independent_examples(trial: _Trial) -> str | None:
    if trial.objective.couples_examples or trial.codes.shape[1] < 2:
        return None
    codes, loss = trial.codes, trial.loss(trial.codes)
    others = codes.roll(1, 0)
    even = torch.arange(codes.shape[1], device=codes.device) % 2 == 0
    for kept in (even, ~even):
        mask = kept.view(-1, *[1] * (codes.ndim - 2))
        changed = trial.loss(torch.where(mask, codes, others))
        if not agree(changed[:, kept.cpu()], loss[:, kept.cpu()], exact=True):
            return (
                "the loss of an example changes with the codes of others; expected independent losses, or "
                "dgrad.objective(f, couples_examples=True)"
            )
    return None


def _depends_on_its_code(trial: _Trial) -> str | None:
    if not torch.equal(trial.loss(trial.codes), trial.loss(trial.codes.roll(1, 0))):
        return None
    return (
        "other codes have the same loss; expected a loss of the codes that it is given, not of actions that were "
        "already taken: for those see estimator.draw"
    )


def _independent_samples(trial: _Trial) -> str | None:
    if trial.draws():  # another number of samples draws other numbers
        return None
    alone = torch.cat([trial.loss(codes) for codes in trial.codes.split(1)])
    if agree(alone, trial.loss(trial.codes)):
        return None
    return "a code has another loss alone than among other samples; expected losses of single codes"


def _differentiable(trial: _Trial) -> str | None:
    if trial.differentiable:
        codes = trial.codes.detach().clone().requires_grad_()
        check_dependence(trial.objective(codes), codes, "this check")
    return None


_CHECKS: list[Callable[[_Trial], str | None]] = [
    _batch_norm,
    _repeatable,
    _independent_examples,
    _depends_on_its_code,
    _independent_samples,
    _differentiable,
]
