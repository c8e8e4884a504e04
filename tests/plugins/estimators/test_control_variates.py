"""Score-function estimators with control variates, and those without replacement: what is particular to each."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._unordered_set import set_weights

DRAWS = 20_000


def _variance(estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: Any) -> float:
    """The total variance of the gradient for one example."""
    _, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=DRAWS)
    return float(error.square().sum() * DRAWS)


def _gradient(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: Any, seed: int = 0
) -> Tensor:
    leaf = logits.clone().requires_grad_()
    estimate = estimator(layer, leaf, loss, generator=Generator().manual_seed(seed))
    return torch.autograd.grad(estimate.loss.sum(), leaf)[0]


def _train(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: Any, steps: int, lr: float
) -> None:
    """Its learned parts alone, on one batch of logits."""
    optimizer = torch.optim.Adam(estimator.parameters(), lr=lr)
    generator = Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        estimator(layer, logits, loss, generator=generator).loss.mean().backward()
        optimizer.step()


def _made(name: str, layer: dgrad.LatentLayer, **hyperparameters: object) -> GradientEstimator:
    estimator = dgrad.estimator(name, **hyperparameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator.set_layer(layer)
    return estimator


# Learned parts

LEARNING = [
    ("reinforce", {"baseline": "input-dependent"}),
    ("rebar", {}),
    ("relax", {}),
    ("relax", {"with_loss": True}),
]


@pytest.mark.parametrize("objective", ["cross-entropy", "spiky"])
@pytest.mark.parametrize("spec", ["1x5", "3x2"])
@pytest.mark.parametrize(("name", "hyperparameters"), LEARNING, ids=str)
def test_unbiased_whatever_the_learned_parts_are(
    name: str, hyperparameters: dict[str, object], spec: str, objective: str
) -> None:
    layer = dgrad.latent(spec)
    estimator = _made(name, layer, **hyperparameters)
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=DRAWS)
    truth = exact_gradient(layer, logits, loss)[0]
    assert ((mean - truth).abs() <= 5 * error + 1e-6).all(), f"{(mean - truth) / error}"


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("rebar", {"eta": 0.2, "temperature": 3.0}),
        ("relax", {}),
        ("relax", {"with_loss": True, "temperature": 3.0}),
    ],
    ids=str,
)
def test_learning_lowers_the_variance(name: str, hyperparameters: dict[str, object]) -> None:
    """To less than three quarters of what it was."""
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    estimator = _made(name, layer, **hyperparameters)
    with torch.no_grad():  # the moving average comes by itself: start where it is there
        for _ in range(300):
            estimator(layer, logits.expand(64, -1, -1), loss, generator=Generator().manual_seed(2))
    before = _variance(estimator, layer, logits, loss)
    _train(estimator, layer, logits.expand(64, -1, -1), loss, steps=400, lr=1e-2)
    assert _variance(estimator, layer, logits, loss) < 0.75 * before


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_learned_parts_descend_the_mean_squared_gradient(name: str) -> None:
    """The gradient of every learned number against finite differences, with the same noise."""
    layer = dgrad.latent("2x3")
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)["cross-entropy"]
    estimator = _made(name, layer, **({"hidden": 3, "with_loss": True} if name == "relax" else {})).double()
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    def penalty() -> float:
        return float(_gradient(estimator, layer, logits, loss).square().sum((-2, -1)).mean())

    parameters = list(estimator.parameters())
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    gradients = torch.autograd.grad(estimate.loss.mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            start, values = flat[i].item(), []
            for shift in (1e-5, -1e-5):
                flat[i] = start + shift
                values.append(penalty())
            flat[i] = start
            assert float(gradient.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("name", "hyperparameters"), LEARNING[1:], ids=str)
def test_the_control_variate_leaves_the_decoder_alone(name: str, hyperparameters: dict[str, object]) -> None:
    """The decoder's gradient is that of the loss at the hard codes, although the same decoder was differentiated twice."""
    layer = dgrad.latent("2x3")
    estimator = _made(name, layer, **hyperparameters)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=Generator().manual_seed(0)).requires_grad_()

    def loss(codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ torch.tanh(weight).T).exp().sum(-1)

    logits = small_logits(layer, batch=5).requires_grad_()
    estimate = estimator(layer, logits, loss)
    (gradient,) = torch.autograd.grad(estimate.loss.mean(), weight, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(estimate.codes).mean(), weight)[0])
    estimate.loss.mean().backward()


def test_rebar_without_its_control_variate_is_reinforce() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=6), small_objectives(layer)["cross-entropy"]
    rebar, reinforce = (
        _gradient(dgrad.estimator(name, **hyperparameters), layer, logits, loss)
        for name, hyperparameters in (("rebar", {"eta": 0.0}), ("reinforce", {"baseline": "none"}))
    )
    torch.testing.assert_close(rebar, reinforce)


def test_rebar_follows_schedules_where_it_does_not_learn() -> None:
    estimator = dgrad.estimator("rebar", learn="false", temperature="geometric:1:0.1", eta=0.5)
    assert not list(estimator.parameters())
    assert not estimator.state_dict()
    estimator.set_run_length(10)
    estimator.set_step(10)
    assert float(estimator.temperature) == pytest.approx(0.1)


def test_relax_takes_a_loss_without_a_gradient() -> None:
    layer = dgrad.latent("2x3")
    estimator = _made("relax", layer)
    table = torch.tensor([[1.0, 5.0, 2.0], [0.0, 1.0, 7.0]])

    def loss(codes: Tensor) -> Tensor:
        return table[torch.arange(2), codes.argmax(-1)].sum(-1)

    logits = torch.zeros(64, 2, 3, requires_grad=True)
    estimator(layer, logits, loss).loss.mean().backward()
    assert logits.grad is not None
    assert logits.grad.any()
    assert all(parameter.grad is not None for parameter in estimator.parameters())


@pytest.mark.parametrize(("name", "hyperparameters"), [LEARNING[0], LEARNING[2]], ids=str)
def test_learned_parts_must_be_made_first(name: str, hyperparameters: dict[str, object]) -> None:
    layer = dgrad.latent("2x3")
    with pytest.raises(
        dgrad.InputError, match=rf"{name}.* learns something of the latent layer's size; expected .*set_layer"
    ):
        dgrad.estimator(name, **hyperparameters)(layer, torch.zeros(1, 2, 3), lambda codes: codes.sum((-2, -1)))


def test_the_baseline_learns_the_loss_of_each_input() -> None:
    """A loss that depends on the input alone: the moving average leaves its spread, the network of the logits does not."""
    layer = dgrad.latent("2x4")
    logits = small_logits(layer, batch=8, scale=2.0).float()
    levels = 5 * torch.arange(8.0)
    norms = {}
    for baseline in ("moving-average", "input-dependent"):
        estimator = _made("reinforce", layer, baseline=baseline)

        def loss(codes: Tensor) -> Tensor:
            return levels.expand(codes.shape[:2])

        if baseline == "input-dependent":
            _train(estimator, layer, logits, loss, steps=800, lr=1e-2)
        else:
            for _ in range(800):
                estimator(layer, logits, loss)
        norms[baseline] = float(_gradient(estimator, layer, logits, loss).norm())
    assert norms["input-dependent"] < 0.05 * norms["moving-average"]


# MuProp


def test_muprop_is_exact_for_a_linear_loss() -> None:
    layer = dgrad.latent("3x4")
    logits = small_logits(layer, batch=5)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=Generator().manual_seed(0))

    def loss(codes: Tensor) -> Tensor:
        return (codes * weight).sum((-2, -1)) + 3

    expected = exact_gradient(layer, logits, loss)
    torch.testing.assert_close(_gradient(dgrad.estimator("muprop"), layer, logits, loss), expected)


def test_muprop_by_hand() -> None:
    layer = dgrad.latent("2x3")
    logits = small_logits(layer, batch=4)
    loss = small_objectives(layer)["cross-entropy"]
    leaf = logits.clone().requires_grad_()
    estimate = dgrad.estimator("muprop")(layer, leaf, loss, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), leaf)
    p = logits.softmax(-1).requires_grad_()
    (slope,) = torch.autograd.grad(loss(p.unsqueeze(0)).sum(), p)
    codes = estimate.codes[0]
    with torch.no_grad():
        rest = loss(codes.unsqueeze(0))[0] - loss(p.unsqueeze(0))[0] - (slope * (codes - p)).sum((-2, -1))
        expected = rest[:, None, None] * (codes - p) + p * (slope - (p * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


# Sum and sample; the unordered set


@pytest.mark.parametrize("spec", ["1x2", "1x5", "3x2"])
@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("sum-and-sample", {"explicit": 7}),
        ("sum-and-sample", {"explicit": 1000, "baseline": "none"}),
        ("unordered-set", {"samples": 8}),
    ],
    ids=str,
)
def test_exact_where_the_evaluations_cover_the_support(
    name: str, hyperparameters: dict[str, object], spec: str
) -> None:
    layer = dgrad.latent(spec)
    estimator = dgrad.estimator(name, **hyperparameters)
    assert estimator.traits.evaluations(layer) == layer.support_size
    logits = small_logits(layer, batch=6, scale=2.0)
    for loss in small_objectives(layer).values():
        torch.testing.assert_close(_gradient(estimator, layer, logits, loss), exact_gradient(layer, logits, loss))


def test_the_weights_of_a_set_are_those_of_all_its_orders() -> None:
    """Against the sum over permutations, in the plainest form."""
    p = torch.tensor([0.3, 0.05, 0.2, 0.1], dtype=torch.float64)

    def probability(order: tuple[int, ...], gone: float) -> float:
        result = 1.0
        for s in order:
            result *= float(p[s]) / (1 - gone)
            gone += float(p[s])
        return result

    def of_set(codes: set[int], without: set[int]) -> float:
        gone = sum(float(p[s]) for s in without)
        return sum(probability(order, gone) for order in itertools.permutations(codes - without))

    everything = set(range(4))
    weights, pairs = set_weights(p.log().unsqueeze(-1))
    for s in range(4):
        first = of_set(everything, {s}) / of_set(everything, set())
        assert float(weights[s, 0]) == pytest.approx(float(p[s]) * first)
        for other in range(4):
            second = 1.0 if s == other else of_set(everything, {s, other}) / of_set(everything, {s})
            assert float(pairs[s, other, 0]) == pytest.approx(float(p[other]) * second)


@pytest.mark.parametrize("m", [2, 5, 8])
def test_the_weights_of_a_set_stay_an_average_at_extremes(m: int) -> None:
    """One code with all the probability, all with next to none: weights and baselines still sum to 1."""
    for log_p in (
        torch.cat([torch.zeros(1), torch.full((m - 1,), -2e4)]),
        torch.cat([torch.full((1,), -1e-17), -40 - torch.arange(m - 1.0)]),
        torch.full((m,), -46.0),
        torch.full((m,), -2e4),
        torch.full((m,), -math.log(m)),
    ):
        weights, pairs = set_weights(log_p.double().unsqueeze(-1))
        torch.testing.assert_close(weights.sum(0), torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(pairs.sum(1), torch.ones(m, 1, dtype=torch.float64))


def test_the_code_outside_is_drawn_from_the_rest() -> None:
    """Frequencies of the sampled code against q without the explicit codes, in 5 standard errors."""
    layer, draws = dgrad.latent("2x3"), 50_000
    logits = small_logits(layer)
    estimate = dgrad.estimator("sum-and-sample", explicit=2)(
        layer, logits.expand(draws, -1, -1), lambda codes: codes.sum((-2, -1)), generator=Generator().manual_seed(0)
    )
    support = layer.enumerate(like=logits)
    q = layer.log_prob(logits, support.unsqueeze(1)).exp()[:, 0]
    frequency = (estimate.codes[-1].flatten(1) @ support.flatten(1).T == 2).double().mean(0)
    truth = q.clone()
    truth[q.topk(2).indices] = 0
    truth = truth / truth.sum()
    assert ((frequency - truth).abs() <= 5 * (truth * (1 - truth) / draws).sqrt()).all()


@pytest.mark.parametrize("name", ["sum-and-sample", "unordered-set"])
def test_a_constant_loss_has_no_gradient(name: str) -> None:
    """The baseline takes it away draw by draw, not only in the mean."""
    layer = dgrad.latent("4x5")
    logits = small_logits(layer, batch=8)
    gradient = _gradient(dgrad.estimator(name), layer, logits, lambda codes: 7 + 0 * codes.sum((-2, -1)))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_at_equal_evaluations_without_replacement_beats_leave_one_out() -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    rloo, unordered = (
        _variance(dgrad.estimator(name, samples=4), layer, logits, loss) for name in ("rloo", "unordered-set")
    )
    assert unordered < 0.9 * rloo


# Bad input


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("reinforce", {"baseline": "magic"}, "one of none, moving-average, input-dependent; got 'magic'"),
        ("reinforce", {"hidden": 0}, "hidden must be a whole number of at least 1; got 0"),
        ("muprop", {"samples": 0}, "samples must be a whole number of at least 1; got 0"),
        ("rebar", {"temperature": 0}, "temperature must stay above 0"),
        ("relax", {"with_loss": "perhaps"}, "with_loss: expected true or false; got 'perhaps'"),
        ("sum-and-sample", {"explicit": 0}, "explicit must be a whole number of at least 1; got 0"),
        ("sum-and-sample", {"baseline": "mean"}, "one of none, explicit-mean; got 'mean'"),
        ("unordered-set", {"samples": 1}, "samples must be a whole number of at least 2; got 1"),
        ("unordered-set", {"samples": 9}, "samples must be at most 8; got 9: for more take rloo"),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, hyperparameters: dict[str, object], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.estimator(name, **hyperparameters)
