"""The checks of latents against mutants: each has one fault, which the check that names it must catch."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

import dgrad
from dgrad.core.latent_layer import CodeDistribution, LatentLayer
from dgrad.core.moves import Moves, Toggles
from dgrad.testing import (
    LATENT_CHECKS,
    ConformanceError,
    check_latent,
    parametrize_with_latent_checks,
    run_latent_checks,
)
from dgrad.testing._kit import name_of, run_latent_check
from dgrad_plugins.latents import Categorical

EXAMPLE: Any = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "latent.py"))["Bits"]


@dataclass(frozen=True)
class Bits(EXAMPLE):
    """The example of the guide, which a mutant changes in one step."""

    count: int = 3

    def __str__(self) -> str:
        return f"sound-bits:{self.count}"


class WrongSampler(Bits):
    """Five per cent too hot."""

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return super().sample(logits / 1.1, samples, generator=generator)


class WrongSupport(Bits):
    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return super().sample(logits, samples, generator=generator) * 2


class OneDrawForAll(Bits):
    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return super().noise(logits[:1], samples, generator=generator).expand(samples, *logits.shape)


class WrongNoise(Bits):
    """Normal noise."""

    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return torch.randn((samples, *logits.shape), dtype=logits.dtype, generator=generator)

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return torch.bernoulli(logits.detach().sigmoid().expand(samples, *logits.shape), generator=generator)


class WrongLogZ(Bits):
    def log_z(self, logits: Tensor) -> Tensor:
        return super().log_z(logits) + 0.01


class WrongMean(Bits):
    def mean(self, logits: Tensor) -> Tensor:
        return (1.01 * logits).sigmoid()


class MeanWithoutDerivative(Bits):
    def mean(self, logits: Tensor) -> Tensor:
        return logits.sigmoid().detach() + 0 * logits


class WrongDerivativeOfMean(Bits):
    """Right in value and in the first derivative of log Z."""

    def mean(self, logits: Tensor) -> Tensor:
        wrong = (1.1 * logits).sigmoid()
        return super().mean(logits).detach() + wrong - wrong.detach()


class NaiveLogZ(Bits):
    """Overflows."""

    def log_z(self, logits: Tensor) -> Tensor:
        return (1 + logits.exp()).log().sum(-1)


class WrongKL(Bits):
    def kl(self, logits: Tensor) -> Tensor:
        return math.log(self.support_size) + self.entropy(logits)


class WrongArgmax(Bits):
    def argmax(self, potentials: Tensor) -> Tensor:
        return (potentials > 0.1).to(potentials.dtype)


class WrongCount(Bits):
    @property
    def support_size(self) -> int:
        return 7


class OneIndexForTwo(Bits):
    def indices(self, codes: Tensor) -> Tensor:
        return codes.long().cumsum(-1)[..., :1]


class WrongPotentials(Bits):
    @property
    def moves(self) -> Moves:
        class Wrong(Toggles):
            def potentials(self, codes: Tensor, changes: Tensor) -> Tensor:
                return changes.movedim(0, -1)

        return Wrong(self.shape)


class SameNeighbourTwice(Bits):
    @property
    def moves(self) -> Moves:
        class Twice(Toggles):
            def neighbours(self, codes: Tensor) -> Tensor:
                return super().neighbours(codes)[[0, 1, 1]]

        return Twice(self.shape)


class Inverts(Bits):
    """By a function that looks at its result."""

    def log_z(self, logits: Tensor) -> Tensor:
        eye = torch.eye(self.count, dtype=logits.dtype)
        return super().log_z((torch.linalg.inv(eye) @ logits.unsqueeze(-1)).squeeze(-1))


class GlobalGenerator(Bits):
    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return super().noise(logits, samples)


class AsksForAValue(Bits):
    def log_z(self, logits: Tensor) -> Tensor:
        return super().log_z(logits / logits.abs().max().item()) if logits.max() > 1e9 else super().log_z(logits)


class NeverHard(Bits):
    def relax(self, potentials: Tensor, temperature: float | Tensor) -> Tensor:
        return super().relax(potentials, temperature + 0.1)


class Widens(Bits):
    def mean(self, logits: Tensor) -> Tensor:
        return super().mean(logits.double())


class WrongDistribution(Bits):
    def distribution(self, logits: Tensor) -> Distribution:
        return CodeDistribution(self, 2 * logits)


class NotEqual(Bits):
    def __eq__(self, other: Any) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


class WrongRows(Categorical):
    def linear_sweep(self, weights: Tensor, codes: Tensor) -> Tensor:
        return weights.expand_as(codes)


MUTANTS: list[tuple[Callable[[], LatentLayer], str]] = [
    (WrongSampler, "sample"),
    (WrongSupport, "sample"),
    (OneDrawForAll, "generator"),
    (WrongNoise, "noise"),
    (WrongLogZ, "log prob"),
    (WrongLogZ, "entropy and kl"),
    (WrongMean, "mean"),
    (MeanWithoutDerivative, "derivatives"),
    (WrongDerivativeOfMean, "derivatives"),
    (NaiveLogZ, "extreme logits"),
    (WrongKL, "entropy and kl"),
    (WrongArgmax, "argmax"),
    (WrongCount, "support"),
    (OneIndexForTwo, "indices and codes"),
    (WrongPotentials, "moves"),
    (SameNeighbourTwice, "moves"),
    (Inverts, "asks the device nothing"),
    (GlobalGenerator, "generator"),
    (AsksForAValue, "asks the device nothing"),
    (NeverHard, "relax"),
    (Widens, "shapes and dtypes"),
    (WrongDistribution, "distribution"),
    (NotEqual, "spec"),
    (lambda: WrongRows(2, 3), "linear sweep"),
]


@pytest.mark.parametrize(("mutant", "name"), MUTANTS)
def test_every_mutant_is_caught_by_the_check_that_names_its_fault(mutant: Callable[[], LatentLayer], name: str) -> None:
    (check,) = [check for check in LATENT_CHECKS if name_of(check) == name]
    result = run_latent_check(check, mutant())
    assert result.status == "failed"
    assert "Error: " not in result.detail, "found by a check, not by an accident"


def test_every_check_that_runs_here_catches_a_mutant() -> None:
    assert {name_of(check) for check in LATENT_CHECKS} - {"other devices"} == {name for _, name in MUTANTS}


def test_the_sound_layer_that_the_mutants_are_made_from_passes() -> None:
    results = {result.name: result for result in run_latent_checks(Bits())}
    assert all(result.ok for result in results.values())
    skipped = {name for name, result in results.items() if result.status == "skipped"}
    assert skipped == {"spec", "linear sweep", "other devices"}
    assert results["spec"].detail == "no latent is registered as 'sound-bits'"


def test_a_failure_says_which_check_and_by_how_much() -> None:
    with pytest.raises(
        ConformanceError, match=r"fails \d+ of \d+ checks:\n(.*\n)*.*log prob: failed: .*by enumeration"
    ):
        check_latent(WrongLogZ())


@parametrize_with_latent_checks([Bits(2)])
def test_conforms(layer: LatentLayer, check: Callable[[LatentLayer], None]) -> None:
    check(layer)


def test_a_large_layer_skips_what_needs_enumeration() -> None:
    results = {result.name: result for result in run_latent_checks(dgrad.latent("20x10"))}
    assert all(result.ok for result in results.values())
    assert results["mean"].detail == "latent 20x10 has too many codes to enumerate"
    assert results["generator"].status == "passed"
