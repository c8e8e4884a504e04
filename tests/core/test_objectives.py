"""Objectives: functions of codes and of their integers, their sweeps, and what they are refused for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import dgrad
from dgrad.core import objective_guards
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import FunctionObjective, Objective
from dgrad.core.random import RandomState
from dgrad.core.wrapped_objectives import in_dtype
from dgrad.errors import CostWarning
from dgrad.testing import small_logits, small_objectives

BATCH = 5


def _codes(layer: dgrad.LatentLayer, samples: int = 2, *, batch: int = BATCH, seed: int = 0) -> Tensor:
    return layer.sample(torch.zeros(batch, *layer.shape), samples, generator=Generator().manual_seed(seed))


def _every_change(loss: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """The definition of a sweep: one call for each changed coordinate."""
    expected = torch.empty_like(codes)
    n, k = codes.shape[2:]
    for i in range(n):
        for j in range(k):
            changed = codes.clone()
            changed[:, :, i] = F.one_hot(torch.tensor(j), k).to(codes.dtype)
            expected[:, :, i, j] = loss(changed)
    return expected


class Counting:
    """A function of codes or integers that counts the losses of an example it computed."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.losses = 0
        self.calls = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.losses += inputs.shape[0] * inputs.shape[1]
        return self.function(inputs)


def test_function_objective_sweep_is_every_single_change() -> None:
    layer = dgrad.latent("3x4")
    codes = layer.sample(small_logits(layer, batch=5), 2, generator=Generator().manual_seed(0))
    loss = small_objectives(layer)["spiky"]
    expected = _every_change(loss, codes)
    for per_call in (1, 7, 64, 10_000):
        torch.testing.assert_close(FunctionObjective(loss, codes_per_call=per_call).sweep(codes), expected)


@pytest.mark.parametrize("budget", [1, 3000, 2**24])
def test_a_sweep_keeps_to_its_budget_of_bytes(budget: int) -> None:
    """A code of 3x200 floats takes 2,400 bytes, 10 of them 24,000: a call changes as many as fit, at least one each."""
    layer = dgrad.latent("3x200")
    codes, sizes = _codes(layer), []
    objective = dgrad.objective(
        lambda codes: sizes.append(len(codes)) or codes[..., 0].sum(-1), bytes_per_call=10 * budget
    )
    objective.sweep(codes)
    assert sum(sizes) == 2 + 2 * 3 * 199
    assert max(sizes) == 2 * min(3 * 199, max(1, budget // 2400))


# Indices


def _lookup(spec: str) -> tuple[dgrad.LatentLayer, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A layer, codes, and a loss as a function of the codes' integers and of the codes."""
    layer = dgrad.latent(spec)
    n, k = layer.shape
    table = torch.randn(BATCH, n, k, generator=Generator().manual_seed(1))

    def of_indices(indices: Tensor) -> Tensor:
        at = table.expand(len(indices), -1, -1, -1).gather(-1, indices.expand(-1, BATCH, -1).unsqueeze(-1))
        return at.squeeze(-1).sum(-1).square()

    return layer, _codes(layer), of_indices, lambda codes: (codes * table).sum((-1, -2)).square()


@pytest.mark.parametrize("bytes_per_call", [1, None])
@pytest.mark.parametrize("spec", ["1x7", "3x4"])
def test_the_sweep_of_integers_is_that_of_their_codes(spec: str, bytes_per_call: int | None) -> None:
    _, codes, of_indices, of_codes = _lookup(spec)
    objective = dgrad.objective(of_indices, indices=True, bytes_per_call=bytes_per_call)
    at, rows = objective.at(codes), torch.zeros(2, BATCH, 1, dtype=torch.long)
    torch.testing.assert_close(at.loss, of_codes(codes))
    torch.testing.assert_close(at.sweep(), _every_change(of_codes, codes))
    torch.testing.assert_close(at.sweep_rows(rows), dgrad.objective(of_codes).at(codes).sweep_rows(rows))
    torch.testing.assert_close(in_dtype(objective, torch.float64).sweep(codes), at.sweep())


def test_a_sweep_of_one_variable_looks_up_each_value_once() -> None:
    """For the whole batch, in one call, and of int64 tensors alone."""
    table = torch.randn(50, generator=Generator().manual_seed(0))
    function = Counting(lambda indices: table[indices].sum(-1))
    at = dgrad.objective(function, indices=True).at(_codes(dgrad.latent("1x50")))
    function.calls = function.losses = 0
    sweep = at.sweep()
    assert (function.calls, function.losses) == (1, 50)
    assert torch.equal(sweep, table.expand(2, BATCH, 1, 50))


def test_integers_of_another_layer_are_its_own() -> None:
    layer = dgrad.latent("pairs:4")
    codes = _codes(layer)
    objective = dgrad.objective(lambda indices: indices.float().sum(-1), indices=True, layer=layer)
    assert torch.equal(objective(codes), layer.indices(codes).float().sum(-1))
    expected = dgrad.objective(lambda codes: layer.indices(codes).float().sum(-1)).at(codes).potentials(layer)
    torch.testing.assert_close(objective.at(codes).potentials(layer), expected)


@pytest.mark.parametrize("name", ["gumbel-softmax", "rebar", "muprop", "imle"])
def test_estimators_that_differentiate_refuse_integers(name: str) -> None:
    layer, _, of_indices, _ = _lookup("3x4")
    objective = dgrad.objective(of_indices, indices=True)
    logits = torch.zeros(BATCH, 3, 4, requires_grad=True)
    with pytest.raises(dgrad.InputError, match=r"of indices has no gradient .* such as direct-rb, leg or rloo"):
        dgrad.estimator(name)(layer, logits, objective)


# Codes that all examples share


class Losses:
    """Losses of codes with data of their own, each written in another way."""

    x = torch.randn(BATCH, 6, generator=Generator().manual_seed(2))
    weight = torch.randn(6, 12, generator=Generator().manual_seed(3))
    table = torch.randn(BATCH, 12, generator=Generator().manual_seed(4))

    def broadcasting(self, codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ self.weight.T - self.x).square().sum(-1)

    def of_codes_alone(self, codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ self.weight.T).square().sum(-1)

    def with_as_many_rows(self, codes: Tensor) -> Tensor:
        """Wrong by broadcasting: it takes as many examples as there are codes."""
        return (codes.flatten(2) * self.table[: codes.shape[1]]).sum(-1)

    def in_a_flat_batch(self, codes: Tensor) -> Tensor:
        """An error by broadcasting."""
        outputs = codes.flatten(2).flatten(0, 1) @ self.weight.T
        return (outputs - self.x.repeat(len(codes), 1)).square().sum(-1).view(codes.shape[:2])


@pytest.mark.parametrize(
    ("name", "shared"),
    [("broadcasting", True), ("of_codes_alone", True), ("with_as_many_rows", False), ("in_a_flat_batch", False)],
)
def test_codes_of_one_variable_are_shared_where_the_function_allows_it(name: str, shared: bool) -> None:
    layer, loss = dgrad.latent("1x12"), getattr(Losses(), name)
    codes, function = _codes(layer), Counting(loss)
    at = dgrad.objective(function).at(codes)
    function.losses = 0
    torch.testing.assert_close(at.sweep(), _every_change(loss, codes))
    assert (function.losses == 12) == shared
    support = layer.enumerate(like=codes)
    function.losses = 0
    everywhere = dgrad.objective(function).everywhere(support, BATCH)
    torch.testing.assert_close(everywhere, loss(support.unsqueeze(1).expand(-1, BATCH, -1, -1)))
    assert (function.losses == 12 + 2 * BATCH) == shared, "two codes are evaluated for each example"


def test_shared_codes_in_sums_and_with_the_gradient_of_a_decoder() -> None:
    layer, decoder = dgrad.latent("1x12"), nn.Linear(12, 6)
    logits = torch.randn(BATCH, 1, 12, generator=Generator().manual_seed(5)).requires_grad_()
    loss = Losses()

    def function(codes: Tensor) -> Tensor:
        return (decoder(codes.flatten(2)) - loss.x).square().sum(-1)

    class Plain(Objective):
        def __call__(self, codes: Tensor) -> Tensor:
            return function(codes)

    gradients = []
    for objective in (dgrad.objective(function), Plain()):
        estimate = dgrad.estimator("exact")(layer, logits, objective + 0.5 * KLObjective(layer, logits))
        gradients.append(torch.autograd.grad(estimate.loss.sum(), [logits, *decoder.parameters()]))
        sweep = (objective + 0.5 * KLObjective(layer, logits)).sweep(_codes(layer))
        gradients[-1] = [*gradients[-1], sweep]
    torch.testing.assert_close(*gradients)


# Random numbers


def _noisy(kind: str) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    weight, dropout = torch.randn(12, 64), nn.Dropout(0.5)
    return {
        "module": lambda codes: dropout(codes.flatten(2) @ weight).square().sum(-1),
        "function": lambda codes: F.dropout(codes.flatten(2) @ weight, 0.5, training=True).square().sum(-1),
        "rand": lambda codes: (codes.flatten(2) @ weight * torch.rand(*codes.shape[:2], 64)).sum(-1),
        "bernoulli": lambda codes: (torch.bernoulli((codes.flatten(2) @ weight).sigmoid()) * weight[0]).sum(-1),
    }[kind]


@pytest.mark.parametrize("spec", ["1x12", "3x4"])
@pytest.mark.parametrize("kind", ["module", "function", "rand", "bernoulli"])
def test_a_code_and_its_changed_codes_see_the_same_random_numbers(kind: str, spec: str) -> None:
    """Each loss of the sweep is that of a call from the state in which the code itself was evaluated.

    All but `torch.bernoulli`, which vmap refuses, are swept in one call.
    """
    function, codes = _noisy(kind), _codes(dgrad.latent(spec))
    state = RandomState(codes.device)
    at = dgrad.objective(function).at(codes)
    torch.rand(3)  # what others draw in between changes nothing
    now = torch.get_rng_state()
    sweep = at.sweep()
    assert torch.equal(torch.get_rng_state(), now), "the sweep itself draws nothing new"
    torch.testing.assert_close(sweep, _every_change(lambda changed: state.again(function, changed), codes))
    assert at.vectorises == (kind != "bernoulli")
    own = sweep[codes == 1].view(2, BATCH, -1)
    torch.testing.assert_close(own, at.loss.unsqueeze(-1).expand_as(own))
    same = dgrad.objective(function).at(codes[:, :1].expand_as(codes))
    assert same.loss[0].unique().numel() == BATCH, "other examples see other random numbers"


@pytest.mark.parametrize("kind", ["module", "function", "rand"])
def test_codes_that_all_examples_share_see_the_same_random_numbers(kind: str) -> None:
    layer, function = dgrad.latent("1x12"), _noisy(kind)
    support = layer.enumerate(like=torch.zeros(()))
    state = RandomState(support.device)
    losses = dgrad.objective(function).everywhere(support, BATCH)
    for loss, code in zip(losses, support, strict=True):
        torch.testing.assert_close(loss, state.again(function, code.expand(1, BATCH, 1, 12))[0])


def test_integers_see_the_same_random_numbers_too() -> None:
    layer, codes = dgrad.latent("3x4"), _codes(dgrad.latent("3x4"))
    embedding = torch.randn(4, 8, generator=Generator().manual_seed(0))
    objective = dgrad.objective(lambda indices: F.dropout(embedding[indices], 0.5).sum((-1, -2)), indices=True)
    at = objective.at(codes)
    own = at.sweep()[codes == 1].view(2, BATCH, -1)
    assert torch.equal(own, at.loss.unsqueeze(-1).expand_as(own))
    assert not torch.equal(at.sweep(), objective.at(codes).sweep()), "the next evaluation draws anew"
    assert layer.shape == codes.shape[2:]


def test_dropout_hardly_raises_the_variance_of_a_sweep() -> None:
    """At p = 0.2 by less than 3 times; with other masks for changed codes it was 12-fold.

    The ratio of two variances over 400 examples, each of 12 coordinates: its standard error is below a tenth.
    """
    layer, batch = dgrad.latent("3x4"), 400
    torch.manual_seed(0)
    first, last, x = nn.Linear(12, 32), nn.Linear(32, 20), torch.rand(20).round()
    logits = torch.zeros(batch, 3, 4, requires_grad=True)
    variances = []
    for rate in (0.0, 0.2):

        def loss(codes: Tensor, rate: float = rate) -> Tensor:
            outputs = last(F.dropout(first(codes.flatten(2)).relu(), rate))
            return F.binary_cross_entropy_with_logits(outputs, x.expand_as(outputs), reduction="none").sum(-1)

        estimate = dgrad.estimator("leg")(layer, logits, loss, generator=Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
        variances.append(gradient.var(0).sum())
    assert variances[1] < 3 * variances[0]


# What a sweep refuses or warns of


@pytest.mark.parametrize("spec", ["1x12", "3x4"])
def test_batch_norm_in_training_mode_is_refused_in_a_sweep(spec: str) -> None:
    norm, codes = nn.BatchNorm1d(12), _codes(dgrad.latent(spec))
    objective = dgrad.objective(lambda codes: norm(codes.flatten(2).flatten(0, 1)).view(*codes.shape[:2], -1).sum(-1))
    at = objective.at(codes)
    counted = norm.running_mean.clone()
    with pytest.raises(dgrad.InputError, match=r"BatchNorm in training mode inside a sweep.*expected .eval\(\)"):
        at.sweep()
    assert torch.equal(norm.running_mean, counted), "no imagined code was counted"
    norm.eval()
    assert objective.sweep(codes).isfinite().all()
    norm.train()
    with pytest.raises(dgrad.InputError, match="imagined codes"):
        objective.everywhere(dgrad.latent(spec).enumerate(like=codes), BATCH)


def test_a_sweep_of_thousands_of_changes_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_guards, "EXPENSIVE", 7)
    codes = _codes(dgrad.latent("3x4"))

    def loss(codes: Tensor) -> Tensor:
        return codes[..., 0].sum(-1)

    with pytest.warns(CostWarning, match=r"9 times for each example; cheaper: .*indices=True.*sweep_share=0.1.*rloo"):
        dgrad.objective(loss).sweep(codes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgrad.objective(loss).sweep(codes)
        dgrad.objective(lambda codes: codes[..., 0].sum(-1)).sweep(_codes(dgrad.latent("1x12")))  # 12 for the batch


def test_a_result_that_is_not_a_loss_of_each_code_says_what_is_expected() -> None:
    with pytest.raises(dgrad.InputError, match=r"returned a float for codes .* sum over everything but"):
        dgrad.objective(lambda codes: 1.0)(_codes(dgrad.latent("3x4")))  # type: ignore[arg-type, return-value]
    with pytest.raises(dgrad.InputError, match=r"returned shape \[\] for codes .* sum over everything but"):
        dgrad.objective(lambda codes: codes.mean())(_codes(dgrad.latent("3x4")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "an objective of nothing"),
        ({"f": torch.sum, "decoder": nn.Linear(2, 2)}, "a function and a decoder"),
        ({"decoder": nn.Linear(2, 2)}, "a decoder without a loss"),
        ({"decoder": nn.Linear(2, 2), "loss": torch.sum, "indices": True}, "a decoder of indices"),
        ({"f": torch.sum, "loss": torch.sum}, "belong to a decoder"),
        ({"f": torch.sum, "bytes_per_call": 0}, "bytes_per_call must be at least 1; got 0"),
        ({"f": FunctionObjective(torch.sum), "couples_examples": True}, "an objective has options of its own"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.objective(**arguments)  # type: ignore[arg-type]


def test_integer_losses_are_numbers_like_others() -> None:
    codes = _codes(dgrad.latent("3x4"))
    at = dgrad.objective(lambda codes: codes.argmax(-1).sum(-1)).at(codes)
    assert torch.equal(at.loss, codes.argmax(-1).sum(-1).float())
    assert at.sweep().dtype == torch.float32


# Coupled examples


def test_coupled_examples_are_refused_by_estimators_that_need_independent_ones() -> None:
    layer, logits = dgrad.latent("3x4"), torch.zeros(BATCH, 3, 4, requires_grad=True)
    coupled = dgrad.objective(lambda codes: (codes - codes.mean(1, True)).square().sum((-1, -2)), couples_examples=True)
    for objective in (coupled, 0.5 * coupled + KLObjective(layer, logits), in_dtype(coupled, torch.float64)):
        for name in ("direct-rb", "rloo", "exact"):
            with pytest.raises(dgrad.InputError, match="this objective couples examples; expected independent"):
                dgrad.estimator(name)(layer, logits, objective)


@pytest.mark.parametrize("name", ["gumbel-softmax", "straight-through", "imle"])
def test_pathwise_estimators_differentiate_through_coupled_examples(name: str) -> None:
    """The gradient of a mean over the batch reaches the logits of all examples."""
    layer, logits = dgrad.latent("3x4"), torch.zeros(BATCH, 3, 4, requires_grad=True)
    weight = torch.randn(BATCH, 3, 4, generator=Generator().manual_seed(6))

    def coupled(codes: Tensor) -> Tensor:
        total = (codes * weight).sum((1, 2, 3), keepdim=True)
        return total.square().expand(-1, codes.shape[1], 1, 1)[..., 0, 0]

    estimator = dgrad.estimator(name)
    objective = dgrad.objective(coupled, couples_examples=True)
    estimate = estimator(layer, logits, objective, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.mean(), logits)
    codes = estimator.codes(layer, logits, generator=Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(coupled(codes).mean(), logits)
    torch.testing.assert_close(gradient, expected)
    assert gradient.flatten(1).abs().sum(1).all()


# Losses that do not depend on the code by a gradient

DIFFERENTIATING = [name for name in dgrad.estimators() if dgrad.estimator(name).traits.differentiable_objective] + [
    "direct-linear",
    "relax",
]


def _ignoring(kind: str) -> Callable[[Tensor], Tensor]:
    experts = torch.randn(2, requires_grad=True)
    return {
        "argmax": lambda codes: experts[codes.argmax(-1)].sum(-1),
        "numpy": lambda codes: torch.from_numpy(np.square(codes.detach().numpy()).sum((-1, -2))),
    }[kind]


@pytest.mark.parametrize("kind", ["argmax", "numpy"])
@pytest.mark.parametrize("name", sorted(set(DIFFERENTIATING)))
def test_a_loss_that_ignores_the_code_is_refused_where_it_is_differentiated(name: str, kind: str) -> None:
    layer = dgrad.latent("3x2")
    estimator = dgrad.estimator(name, with_loss=True) if name == "relax" else dgrad.estimator(name)
    estimator.set_layer(layer)
    logits = torch.zeros(BATCH, 3, 2, requires_grad=True)
    with pytest.raises(
        dgrad.InputError, match=r"does not depend on them by a gradient.*such as direct-rb, leg or rloo"
    ):
        estimator(layer, logits, _ignoring(kind))


def test_a_loss_that_depends_on_the_code_in_one_part_is_fine() -> None:
    layer, logits = dgrad.latent("3x2"), torch.zeros(BATCH, 3, 2, requires_grad=True)
    parts = dgrad.objective(_ignoring("numpy")) + dgrad.objective(lambda codes: codes[..., 0].sum(-1))
    for name in ("gumbel-softmax", "muprop", "imle"):
        (gradient,) = torch.autograd.grad(dgrad.estimator(name)(layer, logits, parts).loss.sum(), logits)
        assert gradient.isfinite().all()


def test_sums_take_functions_differences_and_factors_on_both_sides() -> None:
    codes = _codes(dgrad.latent("2x3"))
    first, second = small_objectives(dgrad.latent("2x3"))["linear"], small_objectives(dgrad.latent("2x3"))["smooth"]
    objective, a, b = dgrad.objective(first), first(codes.double()), second(codes.double())
    cases = {"+": objective + second, "radd": second + objective, "-": objective - second, "*": objective * 2}
    expected = {"+": a + b, "radd": a + b, "-": a - b, "*": 2 * a}
    for name, combined in cases.items():
        torch.testing.assert_close(combined(codes.double()), expected[name])
        torch.testing.assert_close(combined.sweep(codes.double()), _every_change(combined, codes.double()))


def test_a_weight_for_each_example_is_refused() -> None:
    """It would broadcast against the last axis of a sweep, where there are as many values as examples."""
    objective = dgrad.objective(lambda inputs: inputs.flatten(2)[..., ::2].sum(-1))
    with pytest.raises(dgrad.InputError, match=r"a weight of shape \[3\]; expected one number: weigh examples inside"):
        torch.ones(3) * objective
