"""Refining q: against exact coordinate ascent, in evaluation, and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.config import configure
from dgrad.core.objectives import FunctionObjective
from dgrad.core.refinement import refine
from dgrad.data import Batch, Split
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad.vae.evaluation import evaluate_bound, importance_weighted_bound
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.models._dense import linear_vae


def _objective(layer: dgrad.LatentLayer, scale: float = 3.0) -> tuple[FunctionObjective, Tensor]:
    """A random loss for every code of a small support, and the table of these losses."""
    n, k = layer.shape
    table = scale * torch.rand([k] * n, generator=Generator().manual_seed(4))
    return FunctionObjective(lambda codes: table[tuple(codes.argmax(-1).unbind(-1))]), table


def _bound(layer: dgrad.LatentLayer, logits: Tensor, objective: FunctionObjective) -> float:
    """`E_q[f] + KL(q || uniform)`, by enumeration; the mean over the batch."""
    codes = layer.enumerate(like=logits)
    q = layer.log_prob(logits, codes.unsqueeze(1)).exp()
    losses = objective(codes.unsqueeze(1))
    return float(((q * losses).sum(0) + layer.kl(logits)).mean())


@pytest.mark.slow
def test_it_comes_to_where_exact_coordinate_ascent_does() -> None:
    """From 50 starts: 1,500 shrinking steps leave each within 0.01 nats of the fixed point of its own start."""
    layer = dgrad.latent("2x3")
    objective, table = _objective(layer)
    start = torch.randn(50, 2, 3, generator=Generator().manual_seed(5))
    refined = refine(layer, start, objective, 1500, generator=Generator().manual_seed(6))
    exact = refined
    for _ in range(200):  # coordinate ascent: each row's best distribution given the other's mean
        rows = exact.softmax(-1)
        exact = torch.stack([-(rows[:, 1] @ table.T), exact[:, 1]], 1)
        rows = exact.softmax(-1)
        exact = torch.stack([exact[:, 0], -(rows[:, 0] @ table)], 1)
    assert _bound(layer, refined, objective) < _bound(layer, start, objective) - 0.3
    for one, other in zip(refined.unsqueeze(1), exact.unsqueeze(1), strict=True):
        assert _bound(layer, one, objective) == pytest.approx(_bound(layer, other, objective), abs=0.01)


def test_one_step_is_exact_for_a_single_variable() -> None:
    layer = dgrad.latent("1x6")
    objective, table = _objective(layer)
    for steps in (1, 5):
        refined = refine(layer, torch.randn(3, 1, 6), objective, steps)
        torch.testing.assert_close(refined.softmax(-1), (-table).softmax(-1).expand(3, 1, 6))


def test_no_step_changes_nothing_and_no_gradient_flows() -> None:
    layer = dgrad.latent("3x2")
    objective, _ = _objective(layer)
    logits = torch.randn(2, 3, 2, requires_grad=True)
    assert torch.equal(refine(layer, logits, objective, 0), logits)
    assert not refine(layer, logits, objective, 0).requires_grad
    assert not refine(layer, logits, objective, 2).requires_grad
    with pytest.raises(dgrad.InputError, match="at least 0; got -1"):
        refine(layer, logits, objective, -1)


def test_it_repeats_and_leaves_the_global_generator_alone() -> None:
    layer = dgrad.latent("3x3")
    objective, _ = _objective(layer)
    before = torch.get_rng_state()
    first, second = (
        refine(layer, torch.zeros(5, 3, 3), objective, 4, generator=Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_code_of_pairs_is_refused() -> None:
    layer = dgrad.latent("pairs:3")
    with pytest.raises(dgrad.InputError, match=r"stack of independent variables, such as 20x10; got pairs:3"):
        refine(layer, torch.zeros(1, *layer.shape), FunctionObjective(lambda codes: codes.sum((-1, -2))), 1)


# Evaluation


def _model(spec: str) -> tuple[DiscreteVAE, Split, float]:
    """A model with weights large enough to matter, 40 images, and their exact mean `-log p(x)`."""
    torch.manual_seed(0)
    model = linear_vae(dgrad.latent(spec), (1, 1, 6), likelihood("bernoulli"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).requires_grad_(False)
    split = Split((torch.rand(40, 1, 1, 6, generator=Generator().manual_seed(1)) < 0.4).float())
    codes = model.layer.enumerate(like=torch.zeros(1))
    losses = model.reconstruction(split.images)(codes.unsqueeze(1))  # [K, 40]
    return model, split, float(-(model.layer.log_prior - losses).logsumexp(0).mean())


def _evaluated(model: DiscreteVAE, split: Split, steps: int, samples: int = 1) -> float:
    generator = Generator().manual_seed(0)
    return evaluate_bound(model, split, samples=samples, generator=generator, refine_steps=steps).bound


def test_the_bound_of_the_refined_q_lies_between_the_encoders_and_the_likelihood() -> None:
    model, split, truth = _model("3x3")
    encoder, few, many = (_evaluated(model, split, steps) for steps in (0, 3, 200))
    assert truth < many < few < encoder - 0.1


def test_with_a_single_variable_it_is_the_likelihood() -> None:
    model, split, truth = _model("1x8")
    assert _evaluated(model, split, 0) > truth + 0.05
    assert _evaluated(model, split, 1) == pytest.approx(truth, rel=1e-5)


def test_drawn_codes_are_those_of_the_refined_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both estimate the bound of one q, refined by the same noise, within 5 standard errors."""
    model, split, _ = _model("3x3")
    exact = _evaluated(model, split, 3)
    monkeypatch.setattr("dgrad.vae.evaluation.EXACT_SUPPORT", 1)
    generator = Generator().manual_seed(0)
    drawn = evaluate_bound(model, split, samples=300, generator=generator, refine_steps=3)
    assert 0 < drawn.standard_error < 0.05
    assert abs(drawn.bound - exact) < 5 * drawn.standard_error


def test_the_importance_weighted_bound_of_the_refined_q_is_closer() -> None:
    model, split, truth = _model("3x3")
    plain, refined = (
        importance_weighted_bound(model, split, samples=5, generator=Generator().manual_seed(0), refine_steps=steps)
        for steps in (0, 20)
    )
    assert truth - 0.05 < refined < plain - 0.05


# Training

SETTINGS = {"latent": "3x4", "estimator": "direct-rb", "epochs": 1, "device": "cpu", "compile": "off"}


def _gradients(settings: dict[str, Any]) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer and the gradients of its first batch."""
    trainer = Trainer(configure({**SETTINGS, **settings}))
    trainer.loss.set_step(0)
    trainer.loss(next(trainer.batches)).backward()
    return trainer, {name: p.grad for name, p in trainer.loss.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["direct-rb", "gumbel-softmax", "relax", "direct"])
@pytest.mark.parametrize("model", [{}, {"model": "mlp", "hidden": "20"}, {"model": "mixture", "gaussian": 3}])
def test_the_encoder_learns_as_ever_and_the_decoder_from_the_refined_q(estimator: str, model: dict[str, Any]) -> None:
    _, plain = _gradients({**model, "estimator": estimator})
    trainer, refined = _gradients({**model, "estimator": estimator, "refine-steps": 4})
    assert plain.keys() == refined.keys()
    for name, gradient in refined.items():
        assert torch.equal(gradient, plain[name]) != name.startswith("model.decoder"), name
        assert gradient.isfinite().all(), name
    assert all(parameter.requires_grad for parameter in trainer.loss.parameters())


@pytest.mark.slow
def test_the_decoders_gradient_is_that_of_codes_of_the_refined_q() -> None:
    """With one variable the refined q is the posterior: the loss is `-log p(x)`, the mean gradient its gradient.

    The gradient is compared along itself and along a random direction, each within 5 standard errors.
    """
    trainer = Trainer(configure({**SETTINGS, "latent": "1x4", "refine-steps": 1, "batch-size": 20}))
    batch, model = next(trainer.batches), trainer.model
    batch = Batch(batch.images.repeat(3, 1, 1, 1), None, batch.index.repeat(3))  # three draws in one
    codes = model.layer.enumerate(like=torch.zeros(1))
    losses = model.reconstruction(batch.images)(codes.unsqueeze(1))
    truth = -(model.layer.log_prior - losses).logsumexp(0).mean()
    parameters = list(model.decoder.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    expected = gradient(truth)
    random = torch.randn(len(expected), generator=Generator().manual_seed(2))
    directions = torch.stack([expected / expected.norm(), random / random.norm()])
    draws = []
    for _ in range(100):
        loss = trainer.loss(batch)
        draws.append(torch.cat([loss.detach().view(1), directions @ gradient(loss)]))
    drawn = torch.stack(draws)
    error = (drawn.mean(0) - torch.cat([truth.detach().view(1), directions @ expected])).abs()
    assert (error < 5 * drawn.std(0) / len(drawn) ** 0.5).all()
    assert (drawn.std(0) < 0.1 / 3**0.5 * drawn[:, 1].mean().abs()).all(), "else a wrong gradient would pass"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"estimator": "gumbel-softmax", "model": "mlp", "hidden": "20"}, {"model": "mixture", "gaussian": 4}],
)
def test_the_run_reports_the_refined_bound_and_the_encoders(
    train: Callable[..., Run], settings: dict[str, Any]
) -> None:
    run = train(**{**SETTINGS, **settings, "latent": "6x3", "epochs": 2, "refine-steps": 2, "eval-refine-steps": 5})
    best = (run.summary() or {})["best"]
    assert best["test_bound"] < best["test_encoder_bound"] - 0.02


@pytest.mark.slow
def test_without_refinement_a_run_reports_one_bound(train: Callable[..., Run]) -> None:
    assert "test_encoder_bound" not in (train(**SETTINGS).summary() or {})["best"]


# Padding and forbidden values


def test_a_single_variable_with_a_forbidden_value_is_refined_exactly() -> None:
    layer, costs = dgrad.latent("1x3"), torch.tensor([0.0, 1.0, -50.0])
    allowed = torch.tensor([True, True, False])

    def loss(codes: Tensor) -> Tensor:
        assert not codes[..., 2].any(), "a forbidden value"
        return (codes * costs).sum((-1, -2))

    refined = dgrad.refine(layer, torch.zeros(2, 1, 3), loss, 1, allowed=allowed)
    expected = torch.tensor([0.0, -1.0, -torch.inf]).softmax(-1).expand(2, 1, 3)
    torch.testing.assert_close(refined.softmax(-1), expected)


def test_sequences_are_refined_and_padding_stays() -> None:
    layer, generator = dgrad.latent("1x4"), Generator().manual_seed(0)
    logits = torch.randn(3, 3, 1, 4, dtype=torch.float64, generator=generator)
    logits[0, 0, 0, 1] = -torch.inf
    mask = torch.arange(3) < torch.tensor([3, 1, 2]).unsqueeze(-1)
    mixing = torch.randn(12, 12, dtype=torch.float64, generator=generator)

    def loss(codes: Tensor) -> Tensor:
        assert not codes[:, ~mask].any(), "padding"
        flat = codes.flatten(2)
        return torch.einsum("sbi,ij,sbj->sb", flat, mixing, flat)

    def bound(logits: Tensor) -> Tensor:
        exact = dgrad.estimator("exact")(layer, logits, loss, mask=mask).loss
        return exact + dgrad.restricted(layer, mask=mask).kl(logits)

    refined = dgrad.refine(layer, logits, loss, 20, mask=mask, generator=generator)
    assert torch.equal(refined[~mask], logits[~mask])
    assert refined[0, 0, 0, 1] == -torch.inf
    assert (bound(refined) < bound(logits)).all()
