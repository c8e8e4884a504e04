"""Running the checks: all at once, or as pytest cases."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import InputError
from dgrad.testing._checks import CHECKS, Check
from dgrad.testing._latent_checks import LATENT_CHECKS, LatentCheck
from dgrad.testing._shared import NotApplicable

LATENTS = ("1x2", "1x5", "3x2", "2x4")
"""The latents that an estimator is checked with where none is given, as far as it supports them."""


class ConformanceError(AssertionError):
    """An estimator or a latent failed checks; the text names each one and says by how much."""


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        status: `passed`, `failed`, `skipped`, `expected failure` or `unexpected pass`.
        detail: why, in one line.
    """

    name: str
    status: str
    detail: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it leaves nothing to mend."""
        return self.status in ("passed", "skipped", "expected failure")


def run_checks(
    estimator: GradientEstimator,
    layer: LatentLayer | None = None,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Run every check and say what came of each.

    Args:
        estimator: an instance; it is copied, and stays as it is.
        layer: the latent to check it with; otherwise 1x2, 1x5, 3x2 and 2x4, as far as it supports them.
        expected_failures: names of checks that are known to fail, each with its reason. One that passes is a failure.

    Raises:
        InputError: a name in `expected_failures` is no check, or the estimator supports no layer to check it with.
    """
    expected = dict(expected_failures or {})
    _check_names(expected)
    layers = _layers(estimator, layer)
    return [run_check(check, estimator, layers, expected.get(name_of(check))) for check in CHECKS]


def check_estimator(
    estimator: GradientEstimator,
    layer: LatentLayer | None = None,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Run every check; arguments as for `run_checks`.

    Raises:
        ConformanceError: one failed, or one that was expected to fail passed.
        InputError: as `run_checks`.

    >>> import dgrad
    >>> check_estimator(dgrad.estimator("exact"), dgrad.latent("1x2"))
    """
    failures = [result for result in run_checks(estimator, layer, expected_failures=expected_failures) if not result.ok]
    _raise_for(type(estimator).__name__, failures, len(CHECKS))


def run_latent_checks(layer: LatentLayer) -> list[CheckResult]:
    """Run every check of a latent layer and say what came of each."""
    return [run_latent_check(check, layer) for check in LATENT_CHECKS]


def check_latent(layer: LatentLayer) -> None:
    """Hold a latent layer to its contract, against enumeration. Take a small one: up to 4,096 codes.

    Raises:
        ConformanceError: a check failed.

    >>> import dgrad
    >>> check_latent(dgrad.latent("1x2"))
    """
    failures = [result for result in run_latent_checks(layer) if not result.ok]
    _raise_for(f"latent {layer}", failures, len(LATENT_CHECKS))


def _raise_for(name: str, failures: list[CheckResult], count: int) -> None:
    if failures:
        lines = "\n".join(f"  {result.name}: {result.status}: {result.detail}" for result in failures)
        raise ConformanceError(f"{name} fails {len(failures)} of {count} checks:\n{lines}")


def parametrize_with_checks(
    estimators: Sequence[GradientEstimator | str],
    *,
    layer: LatentLayer | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """A pytest decorator: the test gets `estimator` and `check`, once for each pair, and calls `check(estimator)`.

    Args:
        estimators: instances, or names of registered ones.
        layer, expected_failures: as for `run_checks`; an expected failure is a strict xfail.
    """
    import pytest

    expected = dict(expected_failures or {})
    _check_names(expected)
    cases = []
    for given in estimators:
        estimator = dgrad.estimator(given) if isinstance(given, str) else given
        label = given if isinstance(given, str) else f"{type(given).__name__}({given.extra_repr()})"
        for check in CHECKS:
            reason = expected.get(name_of(check))
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            case = Case(check, layer)
            cases.append(pytest.param(estimator, case, id=f"{label}-{name_of(check).replace(' ', '-')}", marks=marks))
    return pytest.mark.parametrize(("estimator", "check"), cases)


def parametrize_with_latent_checks(layers: Sequence[LatentLayer | str]) -> Callable[[Any], Any]:
    """A pytest decorator: the test gets `layer` and `check`, once for each pair, and calls `check(layer)`."""
    import pytest

    def cases() -> Iterator[Any]:
        for given in layers:
            layer = dgrad.latent(given) if isinstance(given, str) else given
            for check in LATENT_CHECKS:
                yield pytest.param(layer, LatentCase(check), id=f"{layer}-{check.__name__}")

    return pytest.mark.parametrize(("layer", "check"), list(cases()))


def name_of(check: Check | LatentCheck) -> str:
    """The check's name as people read it.

    >>> name_of(CHECKS[0])
    'shapes and dtypes'
    """
    return check.__name__.replace("_", " ")


class Case:
    """One check as a pytest test calls it."""

    def __init__(self, check: Check, layer: LatentLayer | None = None) -> None:
        self.check = check
        self.layer = layer

    def __call__(self, estimator: GradientEstimator) -> None:
        _settle(run_check(self.check, estimator, _layers(estimator, self.layer)))


class LatentCase:
    """One check of a latent layer as a pytest test calls it."""

    def __init__(self, check: LatentCheck) -> None:
        self.check = check

    def __call__(self, layer: LatentLayer) -> None:
        _settle(run_latent_check(self.check, layer))


def _settle(result: CheckResult) -> None:
    """End a pytest test as the check ended."""
    import pytest

    if result.status == "skipped":
        pytest.skip(result.detail)
    if not result.ok:
        raise ConformanceError(f"{result.name}: {result.detail}")


def run_check(
    check: Check, estimator: GradientEstimator, layers: list[LatentLayer], reason: str | None = None
) -> CheckResult:
    """The check on every layer; skipped only where it applies to none."""

    def attempt(layer: LatentLayer) -> None:
        own = copy.deepcopy(estimator)
        own.set_layer(layer)
        check(own, layer)

    return _run(check, attempt, layers, reason)


def run_latent_check(check: LatentCheck, layer: LatentLayer) -> CheckResult:
    """The check on a layer."""
    return _run(check, check, [layer])


def _run(
    check: Check | LatentCheck,
    attempt: Callable[[LatentLayer], None],
    layers: list[LatentLayer],
    reason: str | None = None,
) -> CheckResult:
    started = time.perf_counter()
    applied, status, detail = False, "skipped", ""
    for layer in layers:
        try:
            with torch.random.fork_rng(devices=[]):  # what a check draws from the global generator, it puts back
                torch.manual_seed(0)
                attempt(layer)
        except NotApplicable as error:
            detail = detail or str(error)
            continue
        except Exception as error:  # an assertion of the check, or whatever a stranger's code raises
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            place = "" if str(layer) in str(error) else f"latent {layer}: "
            status, detail = "failed", place + kind + " ".join(str(error).split())
            break
        applied = True
    if status != "failed" and applied:
        status, detail = "passed", (check.__doc__ or "").partition("\n")[0]
    if reason is not None and status in ("passed", "failed"):
        status = "expected failure" if status == "failed" else "unexpected pass"
        detail = f"{reason} ({detail})"
    return CheckResult(name_of(check), status, detail, time.perf_counter() - started)


def _layers(estimator: GradientEstimator, layer: LatentLayer | None) -> list[LatentLayer]:
    traits = estimator.traits
    if layer is not None:
        why_unsupported = traits.why_unsupported(layer)
        if why_unsupported is not None:
            raise InputError(why_unsupported)
        return [layer]
    layers = [layer for layer in map(dgrad.latent, LATENTS) if traits.supports(layer)]
    if not layers:
        raise InputError(
            f"{type(estimator).__name__} supports none of the latents {', '.join(LATENTS)}; "
            "expected a layer to check it with: check_estimator(estimator, layer)"
        )
    return layers


def _check_names(expected: Mapping[str, str]) -> None:
    known = [name_of(check) for check in CHECKS]
    for name in expected:
        if name not in known:
            raise InputError(f"no check is named {name!r}; expected one of: {', '.join(known)}")
