"""Schedules: how a hyper-parameter (epsilon, a temperature, the learning rate) moves over a run.

A schedule is a small frozen callable `step -> value` that parses from and prints as text, so that the command line, a
TOML file and `config.json` all write it the same way: the kind, then its numbers, separated by colons.

    0.5                             constant
    exponential:1:1e-5:1000:0.1     start, rate, interval, minimum: max(minimum, start * exp(-rate * step)),
                                    renewed every interval steps
    geometric:1:0.02                from start to end over the whole run, by equal factors
    linear:1:0.1                    from start to end over the whole run, by equal amounts
    cosine:0.01:0                   from start to end over the whole run, along half a cosine
    stable-decay:1:0.1:0.6          start for that share of the run, then to end by equal factors
    warmup:0.1:1:0.3                to end within that share of the run by equal amounts, then end
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from dgrad.errors import InputError, shown, unknown_name

A_NUMBER = "a finite number or a schedule such as geometric:1:0.02"


@dataclass(frozen=True)
class Schedule(ABC):
    """A value for every step of a run; steps count from 0."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at `step`."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The least value that the schedule ever takes."""

    def over(self, steps: int) -> Schedule:
        """This schedule for a run of `steps` steps; only those that span the whole run change."""
        return self

    def __str__(self) -> str:
        numbers = [getattr(self, number.name) for number in _numbers(type(self))]
        return ":".join([_kind(type(self)), *(f"{number:.12g}" for number in numbers if number is not None)])


def _kind(schedule: type[Schedule]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", schedule.__name__).lower()


def _numbers(schedule: type[Schedule]) -> list[Field[Any]]:
    """The fields in the order of the text: the optional length of the run is last."""
    return sorted(fields(schedule), key=lambda number: number.name == "steps")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    >>> str(Constant(0.5)), Constant(0.5)(1000)
    ('0.5', 0.5)
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def lowest(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.12g}"


@dataclass(frozen=True)
class Exponential(Schedule):
    """`max(minimum, start * exp(-rate * step))`, renewed every `interval` steps.

    This is the annealing of Jang et al. 2016 and of the paper. The rate counts single steps: at rate 1e-5 it takes
    230,000 steps to come from 1 to 0.1.

    >>> schedule = Exponential(1.0, 1e-5, 1000, 0.1)
    >>> schedule(999), round(schedule(1000), 4), schedule(10**6)
    (1.0, 0.99, 0.1)
    """

    start: float
    rate: float
    interval: int = 1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.rate < 0 or self.interval < 1 or self.interval != int(self.interval):
            raise InputError(
                "an exponential schedule needs a rate >= 0 and a whole interval >= 1; "
                f"got rate {self.rate:g}, interval {self.interval:g}"
            )

    def __call__(self, step: int) -> float:
        return max(self.minimum, self.start * math.exp(-self.rate * (step - step % int(self.interval))))

    @property
    def lowest(self) -> float:
        return min(self.start, self.minimum)


@dataclass(frozen=True)
class WholeRun(Schedule):
    """From `start` at step 0 to `end` at step `steps`, and `end` from then on. `over` sets the number of steps."""

    start: float
    end: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"a schedule over a whole run needs at least 1 step; got {self}")

    @abstractmethod
    def at(self, fraction: float) -> float:
        """The value when `fraction` of the run, in [0, 1], is done."""

    def __call__(self, step: int) -> float:
        if self.steps is None:
            raise InputError(
                f"the schedule {self} spans a whole run whose length it does not know; "
                "call set_run_length(steps) on the estimator, "
                f"over(steps) on the schedule, or write {self}:STEPS"
            )
        return self.at(min(step / self.steps, 1.0))

    @property
    def lowest(self) -> float:
        return min(self.start, self.end)

    def over(self, steps: int) -> Schedule:
        return self if self.steps is not None else replace(self, steps=steps)


@dataclass(frozen=True)
class Geometric(WholeRun):
    """By equal factors: `start * (end / start) ** fraction`.

    >>> round(Geometric(1.0, 0.01).over(100)(50), 6)
    0.1
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise InputError(
                f"a geometric schedule goes between positive values; got {self}; linear and cosine can reach 0"
            )

    def at(self, fraction: float) -> float:
        return float(self.start * (self.end / self.start) ** fraction)


@dataclass(frozen=True)
class Linear(WholeRun):
    """By equal amounts: `start + (end - start) * fraction`.

    >>> Linear(1.0, 0.0, 10)(5)
    0.5
    """

    def at(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class Cosine(WholeRun):
    """Along half a cosine: `end + (start - end) * (1 + cos(pi * fraction)) / 2` (Loshchilov & Hutter 2016).

    >>> Cosine(2.0, 0.0, 10)(5)
    1.0
    """

    def at(self, fraction: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class StableDecay(Geometric):
    """`start` for a share `stable` of the run, then to `end` by equal factors.

    For epsilon: near 1 the gradient brings back values of the code that q has given up. The decay then takes the bias
    away. `docs/guides/epsilon.md` derives why.

    Reference:
        Hu et al. 2024, MiniCPM: the warmup-stable-decay schedule of learning rates, here without its warm-up.

    >>> schedule = StableDecay(1.0, 0.01, 100, stable=0.6)
    >>> schedule(0), schedule(60), round(schedule(80), 6)
    (1.0, 1.0, 0.1)
    """

    stable: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stable < 1:
            raise InputError(f"a stable share of the run is at least 0 and below 1; got {self.stable:g} in {self}")

    def at(self, fraction: float) -> float:
        return super().at(max(0.0, (fraction - self.stable) / (1 - self.stable)))


@dataclass(frozen=True)
class Warmup(WholeRun):
    """From `start` to `end` within a share `rise` of the run, by equal amounts. Then it stays.

    For the weight of a KL: a code that a decoder does not use yet is not pressed out at once.

    Reference:
        Sonderby et al. 2016, ladder variational autoencoders (arXiv 1602.02282).

    >>> schedule = Warmup(0.0, 1.0, 100, rise=0.5)
    >>> schedule(0), schedule(25), schedule(50), schedule(90)
    (0.0, 0.5, 1.0, 1.0)
    """

    rise: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rise <= 1:
            raise InputError(f"the share of the run that a warmup takes is above 0, at most 1; got {self}")

    def at(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, fraction / self.rise)


SCHEDULES: dict[str, type[Schedule]] = {
    _kind(schedule): schedule for schedule in (Constant, Exponential, Geometric, Linear, Cosine, StableDecay, Warmup)
}


def schedule(value: float | str | Schedule) -> Schedule:
    """A schedule from a number, from its text, or from a schedule itself.

    Raises:
        InputError: the text is no schedule, or a number in it is not finite.

    >>> schedule("geometric:1:0.02")
    Geometric(start=1.0, end=0.02, steps=None)
    >>> str(schedule("exponential:1:1e-5:1000:0.1"))
    'exponential:1:1e-05:1000:0.1'
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise InputError(f"cannot read {shown(value)} as a schedule; expected {A_NUMBER}")
    kind, *numbers = str(value).strip().split(":") if ":" in str(value) else ["constant", str(value)]
    if kind not in SCHEDULES:
        raise unknown_name("schedule", kind, SCHEDULES)
    names = {number.name: number.default is MISSING for number in _numbers(SCHEDULES[kind])}  # must it be there?
    try:
        parsed = {
            name: int(text) if name in ("interval", "steps") else float(text)
            for name, text in zip(names, numbers, strict=False)
        }
        if len(numbers) > len(names) or not all(math.isfinite(number) for number in parsed.values()):
            raise ValueError
        return SCHEDULES[kind](**parsed)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        expected = (
            A_NUMBER
            if kind == "constant"
            else kind
            + "".join(f":{name.upper()}" if needed else f"[:{name.upper()}]" for name, needed in names.items())
        )
        raise InputError(f"cannot read {shown(str(value))} as a schedule; expected {expected}") from None
