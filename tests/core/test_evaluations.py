"""Evaluations: codes are evaluated once, and what came of it is kept with them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import FunctionObjective, Objective
from dgrad.core.wrapped_objectives import SweepCache, in_dtype
from dgrad.testing import small_logits, small_objectives
from dgrad.training.labels import LabelObjective, ObservedObjective
from dgrad.vae.likelihoods import likelihood
from dgrad_plugins.models._dense import linear_vae, mlp_vae
from dgrad_plugins.models._mixture import mixture_vae

LAYER = dgrad.latent("4x3")
BATCH = 5


class Counted(Objective):
    """A smooth loss that counts the codes of an example it was called with."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, codes: Tensor) -> Tensor:
        self.count += len(codes)
        return small_objectives(LAYER)["smooth"](codes.double()).to(codes.dtype)


def _codes(*, seed: int = 0) -> Tensor:
    logits = torch.zeros(BATCH, *LAYER.shape)
    return LAYER.sample(logits, 2, generator=Generator().manual_seed(seed))


def _reconstruction(kind: str) -> Objective:
    torch.manual_seed(0)
    images = torch.rand(BATCH, 1, 4, 5)
    if kind == "mixture":
        return mixture_vae(LAYER, (1, 4, 5), likelihood("bernoulli"), (9, 8), 3).reconstruction(
            images, torch.randn(BATCH, 3)
        )
    model = (
        mlp_vae(LAYER, (1, 4, 5), likelihood("bernoulli"), (7,))
        if kind == "mlp"
        else linear_vae(LAYER, (1, 4, 5), likelihood("bernoulli"))
    )
    model.compiled_kernels = kind == "compiled"
    return model.reconstruction(images)


def _observed() -> Objective:
    labels = torch.randint(-1, 3, (BATCH, 4), generator=Generator().manual_seed(1))
    known = torch.rand(BATCH, 4, 1, generator=Generator().manual_seed(2)) < 0.5
    return ObservedObjective(_reconstruction("mlp"), known, _codes(seed=3)[0]) + LabelObjective(2.0, labels)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "function": Counted,
    "linear": lambda: _reconstruction("linear"),
    "compiled": lambda: _reconstruction("compiled"),
    "mlp": lambda: _reconstruction("mlp"),
    "mixture": lambda: _reconstruction("mixture"),
    "kl": lambda: KLObjective(LAYER, small_logits(LAYER, batch=BATCH).float()),
    "sum": lambda: _reconstruction("mlp") + 0.5 * KLObjective(LAYER, small_logits(LAYER, batch=BATCH).float()),
    "observed": _observed,
    "cache": lambda: SweepCache(_reconstruction("mlp"), {}),
    "float64": lambda: in_dtype(FunctionObjective(Counted()), torch.float64),
}


@pytest.mark.filterwarnings("default:the fast sweep could not be compiled")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_evaluation_is_that_of_the_codes_as_they_were(name: str) -> None:
    """They stay when the caller changes the codes in place, and when others are evaluated."""
    objective, codes = OBJECTIVES[name](), _codes()
    rows = torch.tensor([0, 2]).expand(2, BATCH, 2)
    expected = objective.at(codes.clone())
    truth = (expected.loss, expected.sweep(), expected.sweep_rows(rows), expected.potentials(LAYER))
    at = objective.at(codes)
    codes.copy_(codes.roll(1, -1))
    objective.at(codes).sweep()
    for ours, theirs in zip((at.loss, at.sweep(), at.sweep_rows(rows), at.potentials(LAYER)), truth, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(objective.at(codes).sweep(), truth[1]), "the changed codes have another sweep"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sweeps_have_no_gradient_and_the_loss_has_its_own(name: str) -> None:
    at = OBJECTIVES[name]().at(_codes())
    assert not at.sweep().requires_grad
    assert not at.potentials(LAYER).requires_grad
    assert at.loss.requires_grad == (name not in ("function", "kl", "float64")), "the decoder learns from the loss"


def test_a_view_of_the_codes_is_a_loss_of_the_evaluations_own_copy() -> None:
    codes = torch.tensor([[[[1.0, 0.0]]]])
    at = FunctionObjective(lambda codes: codes[..., 0, 0]).at(codes)
    codes.zero_()
    assert at.loss == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "samples"), [("direct", 1), ("direct-rb", 2), ("leg", 1)])
def test_the_swept_codes_are_evaluated_once(name: str, samples: int, dtype: torch.dtype) -> None:
    """`direct` in bfloat16 used to evaluate 10 codes of 4x3 where its trait says 9."""
    objective, estimator = Counted(), dgrad.estimator(name, samples=samples)
    estimator(LAYER, torch.zeros(BATCH, *LAYER.shape, dtype=dtype), objective)
    assert objective.count == estimator.traits.evaluations(LAYER) == samples * 9


def test_parts_of_a_sum_and_a_scaled_objective_are_evaluated_once() -> None:
    parts = Counted(), Counted()
    at = (0.5 * (parts[0] + 2.0 * parts[1])).at(_codes())
    sweep = at.sweep()
    assert [part.count for part in parts] == [2 + 2 * 4 * 2] * 2
    torch.testing.assert_close(at.loss, 1.5 * Counted()(_codes()))
    torch.testing.assert_close(sweep, 1.5 * Counted().sweep(_codes()))


def test_the_slope_is_the_gradient_of_the_loss_in_the_codes() -> None:
    weight = torch.randn(4, 3, generator=Generator().manual_seed(0)).requires_grad_()
    objective, codes = FunctionObjective(lambda codes: (weight * codes).sum((-2, -1)).square()), _codes()
    with torch.no_grad():
        at = objective.at(codes, differentiable=True)
        slope = at.slope()
    expected = 2 * (weight * codes).sum((-2, -1))[..., None, None] * weight
    torch.testing.assert_close(slope, expected.detach())
    assert not slope.requires_grad
    assert not codes.requires_grad, "the caller's codes stay as they are"
    at = objective.at(codes, differentiable=True)
    at.slope()
    (gradient,) = torch.autograd.grad(at.loss.sum(), weight)
    assert gradient.shape == weight.shape, "the loss still has its gradient for the decoder"


def test_a_slope_that_was_not_asked_for_in_time_says_so() -> None:
    at = Counted().at(_codes())
    with pytest.raises(dgrad.InputError, match=r"expected at\(codes, differentiable=True\)"):
        at.slope()


def test_a_layer_without_moves_has_no_potentials() -> None:
    class Rows(type(LAYER)):  # type: ignore[misc]
        one_hot_rows = False

    with pytest.raises(dgrad.InputError, match="does not say how one variable of a code is changed"):
        Counted().at(_codes()).potentials(Rows(4, 3))


def test_an_objective_of_ones_own_overrides_its_sweep_alone() -> None:
    """The example's sweep is that of changed codes: alone, in a sum, of some rows, and through an estimator."""
    distance = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "objective.py"))["Distance"]
    generator = Generator().manual_seed(0)
    objective = distance(torch.randn(4, 3, 6, generator=generator), torch.randn(BATCH, 6, generator=generator))
    plain, codes, rows = FunctionObjective(objective), _codes(), torch.tensor([1, 3]).expand(2, BATCH, 2)
    for ours, theirs in ((objective, plain), (0.5 * objective + objective, 0.5 * plain + plain)):
        torch.testing.assert_close(ours.sweep(codes), theirs.sweep(codes))
        torch.testing.assert_close(ours.at(codes).sweep_rows(rows), theirs.at(codes).sweep_rows(rows))
    gradients = []
    for each in (objective, plain):
        logits = torch.zeros(BATCH, 4, 3, requires_grad=True)
        estimate = dgrad.estimator("direct-rb")(LAYER, logits, each, generator=Generator().manual_seed(1))
        gradients += torch.autograd.grad(estimate.loss.sum(), logits)
    torch.testing.assert_close(*gradients)
