"""Draw now, learn later, and codes with a gradient: what they give, and what they refuse."""

from __future__ import annotations

import copy

import jaxtyping
import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import ONE_PASS, PATHWISE, GradientEstimator
from dgrad.testing import small_logits

BY_TRAIT = {
    trait: [name for name in dgrad.estimators() if getattr(dgrad.estimator(name).traits, trait)]
    for trait in ("one_pass", "pathwise")
}
PATHWISE_NAMES = BY_TRAIT["pathwise"]


def made(name: str, layer: dgrad.LatentLayer) -> GradientEstimator:
    estimator = dgrad.estimator(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator.set_layer(layer)
    return estimator


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(6, 6, generator=Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("way", ["graph", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", BY_TRAIT["one_pass"])
def test_a_draw_gives_bitwise_what_a_call_gives(name: str, way: str, weight: Tensor) -> None:
    layer = dgrad.latent("3x2")
    logits = small_logits(layer, batch=5).float().requires_grad_()

    def loss(codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ weight).square().sum(-1)

    called, drew = made(name, layer), made(name, layer)
    for seed in range(2):  # the second time with what was averaged
        expected = called(layer, logits, loss, generator=Generator().manual_seed(seed))
        with {"graph": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[way]():
            draw = drew.draw(layer, logits, generator=Generator().manual_seed(seed))
        estimate = draw.estimate(loss(draw.codes.clone()), logits=None if way == "graph" else logits)
        assert torch.equal(estimate.loss, expected.loss)
        assert torch.equal(estimate.codes, expected.codes)
        gradients = torch.autograd.grad(estimate.loss.sum(), (logits, weight))
        truths = torch.autograd.grad(expected.loss.sum(), (logits, weight))
        assert torch.equal(gradients[0], truths[0])
        torch.testing.assert_close(gradients[1], truths[1])  # of other products where codes are evaluated apart


@pytest.mark.parametrize("name", ["reinforce", "relax", "rloo", "sum-and-sample", "unordered-set", "bitflip-1", "arm"])
def test_the_steps_of_an_episode_make_one_draw(name: str) -> None:
    layer = dgrad.latent("2x2")
    logits = small_logits(layer, batch=6).requires_grad_()
    estimator, generator = made(name, layer), Generator().manual_seed(0)
    with torch.no_grad():
        draws = [estimator.draw(layer, step.unsqueeze(0), generator=generator) for step in logits]
    episode = dgrad.Draw.cat(draws)
    losses = torch.rand(episode.codes.shape[:2], dtype=torch.float64)
    apart = [copy.deepcopy(draw).estimate(losses[:, [i]], logits=logits[[i]]).loss for i, draw in enumerate(draws)]
    (expected,) = torch.autograd.grad(torch.cat(apart).sum(), logits)
    (gradient,) = torch.autograd.grad(episode.estimate(losses, logits=logits).loss.sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_a_bandit_learns_its_best_arm_from_draws() -> None:
    """30 steps of a batch of 64 with one try each; the worst of 10 seeds reached 0.9."""
    layer, estimator, generator = dgrad.latent("1x4"), dgrad.estimator("reinforce"), Generator().manual_seed(0)
    reward = torch.tensor([0.0, 0.2, 1.0, 0.1])
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=3.0)
    for _ in range(60):
        draw = estimator.draw(layer, logits.expand(64, -1, -1), generator=generator)
        losses = -reward[layer.indices(draw.codes)[..., 0]]
        optimizer.zero_grad()
        draw.estimate(losses).loss.mean().backward()
        optimizer.step()
    assert logits.softmax(-1)[0, 0, 2] > 0.8


def test_integer_losses_count_as_numbers() -> None:
    layer, logits = dgrad.latent("1x3"), torch.zeros(4, 1, 3, requires_grad=True)
    draw = dgrad.estimator("rloo").draw(layer, logits)
    losses = layer.indices(draw.codes)[..., 0]
    (gradient,) = torch.autograd.grad(draw.estimate(losses).loss.sum(), logits)
    (expected,) = torch.autograd.grad(draw.estimate(losses.float()).loss.sum(), logits)
    assert torch.equal(gradient, expected)


def test_the_names_in_the_errors_are_those_of_the_traits() -> None:
    assert ", ".join(BY_TRAIT["one_pass"]) == ONE_PASS
    assert ", ".join(BY_TRAIT["pathwise"]) == PATHWISE


@pytest.mark.parametrize("name", sorted(set(dgrad.estimators()) - set(BY_TRAIT["one_pass"])))
def test_others_refuse_to_draw(name: str) -> None:
    layer = dgrad.latent("2x2")
    with pytest.raises(
        dgrad.InputError, match=r"cannot draw codes now and learn later.*; expected one of arm, arms,.*"
    ):
        made(name, layer).draw(layer, torch.zeros(1, 2, 2))


@pytest.mark.parametrize("name", sorted(set(dgrad.estimators()) - set(PATHWISE_NAMES)))
def test_others_have_no_codes_with_a_gradient(name: str) -> None:
    layer = dgrad.latent("2x2")
    with pytest.raises(
        dgrad.InputError, match=r"has no code with a gradient: .*; expected one of aimle, direct-linear,"
    ):
        made(name, layer).codes(layer, torch.zeros(1, 2, 2))


def test_what_a_draw_refuses() -> None:
    layer, logits = dgrad.latent("1x3"), torch.zeros(4, 1, 3, requires_grad=True)
    draw = dgrad.estimator("rloo", samples=2).draw(layer, logits)
    with pytest.raises(
        dgrad.InputError, match=r"a loss of shape \[4\]; expected one .* \[2, 4\]: LeaveOneOut needs .* of 2"
    ):
        draw.estimate(torch.zeros(4))
    with pytest.raises(
        dgrad.InputError, match=r"logits of shape \[2, 1, 3\] for a draw from logits of shape \[4, 1, 3\]"
    ):
        draw.estimate(torch.zeros(2, 4), logits=logits[:2])
    single = dgrad.estimator("reinforce").draw(layer, logits)
    with pytest.raises(dgrad.InputError, match=r"expected one .*, \[1, 4\]: give loss.unsqueeze\(0\)"):
        single.estimate(torch.zeros(4))
    with torch.no_grad():
        blind = dgrad.estimator("reinforce").draw(layer, logits)
        assert not blind.estimate(torch.zeros(1, 4)).loss.requires_grad
    with pytest.raises(dgrad.InputError, match=r"a draw without a graph, .*logits=policy\(observations\)"):
        blind.estimate(torch.zeros(1, 4))
    with pytest.raises(dgrad.InputError, match="draws of several estimators"):
        dgrad.Draw.cat([single, blind])
    forbidding = torch.tensor([True, True, False])
    exact = dgrad.estimator("exact")
    with pytest.raises(
        dgrad.InputError, match=r"codes of shapes such as \[3, 4, 1, 3\] and \[2, 4, 1, 3\]; expected as"
    ):
        dgrad.Draw.cat([exact.draw(layer, logits), exact.draw(layer, logits, allowed=forbidding)])
    with pytest.raises(dgrad.InputError, match="no draws; expected at least one"):
        dgrad.Draw.cat([])


def test_a_loss_that_is_no_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Users run no type checker: the message must come from the draw.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    draw = dgrad.estimator("rloo", samples=2).draw(dgrad.latent("1x3"), torch.zeros(4, 1, 3))
    with pytest.raises(dgrad.InputError, match=r"a loss of type float; expected a tensor of shape \[2, 4\]"):
        draw.estimate(1.0)  # type: ignore[arg-type]


# Codes with a gradient


@pytest.mark.parametrize("name", PATHWISE_NAMES)
def test_codes_are_those_of_the_call(name: str) -> None:
    layer = dgrad.latent("2x3")
    logits = small_logits(layer, batch=5).requires_grad_()
    estimator = dgrad.estimator(name)
    seen = []

    def loss(codes: Tensor) -> Tensor:
        seen.append(codes.detach())
        return codes.flatten(2).exp().sum(-1)

    estimator(layer, logits, loss, generator=Generator().manual_seed(1))
    codes = estimator.codes(layer, logits, generator=Generator().manual_seed(1))
    torch.testing.assert_close(codes.detach(), seen[0])
    assert codes.requires_grad
    with torch.no_grad():
        assert not estimator.codes(layer, logits).requires_grad


def test_aimle_adapts_its_strength_when_the_gradient_comes() -> None:
    layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, requires_grad=True)
    estimator = dgrad.estimator("aimle", target=0.25, rate=0.1)
    codes = estimator.codes(layer, logits)
    assert estimator.strength == 1
    (0 * codes).sum().backward()  # no row has a gradient: stronger by exp(0.025)
    assert float(estimator.strength) == pytest.approx(1.0253, abs=1e-4)


def test_codes_in_half_precision_have_a_gradient() -> None:
    layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    codes = dgrad.estimator("imle", strength=10.0).codes(layer, logits)
    assert codes.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(codes[..., 0].sum(), logits)
    assert gradient.dtype == torch.bfloat16
    assert gradient.any()


def test_codes_of_a_backward_pass_of_its_own_are_not_differentiated_twice() -> None:
    layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, requires_grad=True)
    codes = dgrad.estimator("perturbed").codes(layer, logits)
    (gradient,) = torch.autograd.grad(codes.square().sum(), logits, create_graph=True)
    with pytest.raises(dgrad.InputError, match="the gradient of an estimate was differentiated"):
        gradient.sum().backward()


def test_a_reduction_of_another_kind_is_refused() -> None:
    with pytest.raises(dgrad.InputError, match="reduction must be one of mean, sum; got 'none'"):
        dgrad.estimator("imle").codes(dgrad.latent("2x2"), torch.zeros(1, 2, 2), reduction="none")


@pytest.mark.parametrize("method", ["draw", "codes"])
def test_a_plugin_without_the_method_that_its_traits_promise_is_told(method: str) -> None:
    class Empty(GradientEstimator):
        traits = dgrad.Traits(  # type: ignore[assignment]
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: 1,
            reference="none",
            one_pass=True,
            pathwise=True,
        )

    with pytest.raises(dgrad.InputError, match=r"Empty does not define (draw_codes|differentiable_codes)"):
        getattr(Empty(), method)(dgrad.latent("2x2"), torch.zeros(1, 2, 2))


# Sequences, padding and forbidden values


@pytest.fixture(scope="module")
def sequences() -> dict[str, Tensor]:
    """Three sites, of which the second example has two; a forbidden value in each, another one by -inf."""
    logits = small_logits(dgrad.latent("3x2"), batch=2).unsqueeze(-2)  # [2, 3, 1, 2]
    logits[0, 1, 0, 0] = -torch.inf
    allowed = torch.ones(2, 3, 1, 2, dtype=torch.bool)
    allowed[:, 0, 0, 1] = False
    return {"logits": logits, "mask": torch.tensor([[True, True, True], [True, True, False]]), "allowed": allowed}


@pytest.mark.parametrize("credit", ["example", "site", "future"])
@pytest.mark.parametrize("name", BY_TRAIT["one_pass"])
def test_a_draw_of_sequences_gives_what_a_call_gives(name: str, credit: str, sequences: dict[str, Tensor]) -> None:
    layer = dgrad.latent("1x2")
    restrictions = {"mask": sequences["mask"], "allowed": sequences["allowed"], "credit": credit}
    logits = sequences["logits"].requires_grad_()
    folded = credit == "site" or (credit == "future" and dgrad.estimator(name).traits.losses_of_sites)
    learned = layer if folded else dgrad.restricted(layer, mask=sequences["mask"])
    called, drew = made(name, learned), made(name, learned)

    def loss(codes: Tensor) -> Tensor:
        of_sites = (codes[..., 0, 0].cumsum(-1) - 0.7 * codes[..., 0, 1]).square()
        return of_sites.sum(-1) if credit == "example" else of_sites

    expected = called(layer, logits, loss, generator=Generator().manual_seed(0), **restrictions)
    with torch.inference_mode():
        draw = drew.draw(layer, logits, generator=Generator().manual_seed(0), **restrictions)
    assert draw.codes.shape[1:] == logits.shape
    estimate = draw.estimate(loss(draw.codes.clone()), logits=logits)
    torch.testing.assert_close(estimate.loss, expected.loss)
    assert torch.equal(estimate.codes, expected.codes)
    (truth,) = torch.autograd.grad(expected.loss.sum(), logits)
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("name", PATHWISE_NAMES)
def test_codes_of_sequences_have_the_gradient_of_a_call(name: str, sequences: dict[str, Tensor]) -> None:
    layer, logits = dgrad.latent("1x2"), sequences["logits"].requires_grad_()
    restrictions = {"mask": sequences["mask"], "allowed": sequences["allowed"]}

    def loss(codes: Tensor) -> Tensor:
        return (codes[..., 0, 0].cumsum(-1) - 0.7 * codes[..., 0, 1]).square().sum(-1)

    estimate = dgrad.estimator(name)(layer, logits, loss, generator=Generator().manual_seed(0), **restrictions)
    (truth,) = torch.autograd.grad(estimate.loss.mean(), logits)
    codes = dgrad.estimator(name).codes(layer, logits, generator=Generator().manual_seed(0), **restrictions)
    assert not codes.detach()[:, 1, 2].any()
    assert not codes.detach()[:, :, 0, 0, 1].any()
    (gradient,) = torch.autograd.grad(loss(codes).mean(), logits)
    torch.testing.assert_close(gradient, truth)


def test_steps_with_and_without_forbidden_actions_make_one_draw() -> None:
    layer, estimator = dgrad.latent("1x3"), dgrad.estimator("reinforce")
    logits = small_logits(layer, batch=2).requires_grad_()
    forbidding = torch.tensor([[True, False, True]])
    with torch.no_grad():
        draws = [estimator.draw(layer, logits[:1], allowed=forbidding), estimator.draw(layer, logits[1:])]
    episode = dgrad.Draw.cat(draws)
    (gradient,) = torch.autograd.grad(episode.estimate(torch.ones(1, 2), logits=logits).loss.sum(), logits)
    assert gradient[0, 0, 1] == 0
    assert gradient[1].all()
