"""Modules whose hyper-parameters may follow schedules."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.errors import DgradWarning, InputError

Itself = TypeVar("Itself", bound="ScheduledModule")

CALLS_WITHOUT_A_STEP = 100
"""After how many training calls a warning says that nobody moves the schedules."""


class ScheduledModule(nn.Module):
    """A module with hyper-parameters that are numbers or schedules (`hyperparameter`)."""

    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        # Training calls while nobody has set a step; None where that is no matter.
        self._calls_without_step: int | None = None

    def hyperparameter(self, name: str, value: float | str | Schedule, *, above: float | None = None) -> None:
        """Declare a hyper-parameter: `self.name` becomes a 0-d buffer that holds the value of the current step.

        Raises:
            InputError: the value is no schedule, or one of its values is not above `above`.
        """
        try:
            self.schedules[name] = schedule(value)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        # As the buffer will hold it: a number that float32 rounds to the limit is not above it.
        if above is not None and not torch.tensor(self.schedules[name].lowest, dtype=torch.float32) > above:
            raise InputError(f"{name} must stay above {above:g}; got {self.schedules[name]}: give a larger one")
        moves = not _is_constant(self.schedules[name])
        start = self.schedules[name].over(1) if moves else self.schedules[name]
        self.register_buffer(name, torch.tensor(start(0), dtype=torch.float32), persistent=False)
        if moves and type(self).set_step is ScheduledModule.set_step:
            self._calls_without_step = 0

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

    def warn_of_still_schedules(self) -> None:
        """Count a training call, and warn once where a schedule should have moved and nobody moves it."""
        if self._calls_without_step is None or not self.training:
            return
        self._calls_without_step += 1
        if self._calls_without_step == CALLS_WITHOUT_A_STEP:
            still = ", ".join(f"{key}={value}" for key, value in self.schedules.items() if not _is_constant(value))
            warnings.warn(
                f"{type(self).__name__}: {still} has not moved in {CALLS_WITHOUT_A_STEP} training calls; expected "
                "estimator.set_run_length(steps) once and estimator.set_step(step) at each step",
                DgradWarning,
                stacklevel=6,
            )

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
