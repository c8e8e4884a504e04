"""The pairwise latent layer against enumeration in plain Python, and direct optimization with it against a
transcription of the paper's.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad import registry
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import as_objective
from dgrad.core.random import gumbel
from dgrad.core.traits import Traits
from dgrad.core.wrapped_objectives import SweepCache
from dgrad.data import Split
from dgrad.testing import check_estimator, small_logits, small_objectives
from dgrad.training.run_directory import Run
from dgrad.vae.evaluation import evaluate_bound, evaluation_generator
from dgrad.vae.likelihoods import likelihood
from dgrad_cli.main import main
from dgrad_plugins.latents import Pairs
from dgrad_plugins.models._dense import mlp_vae

SPECS = ["pairs:1", "pairs:2", "pairs:3", "pairs:5", "pairs:6"]


def _code(bits: tuple[int, ...]) -> list[float]:
    return [*map(float, bits), *(float(one * other) for one, other in itertools.combinations(bits, 2))]


def _support(n: int) -> Tensor:
    return torch.tensor([_code(bits) for bits in itertools.product((0, 1), repeat=n)], dtype=torch.float64)


@pytest.mark.parametrize("spec", SPECS)
def test_everything_agrees_with_enumeration(spec: str) -> None:
    layer = dgrad.latent(spec)
    n = layer.decoded_shape[0]
    support, logits = _support(n), small_logits(layer, batch=4, scale=2)
    assert layer == pickle.loads(pickle.dumps(layer)) == dgrad.latent(str(layer))
    assert layer.support_size == len(support)
    assert torch.equal(layer.enumerate(like=logits), support)
    weights = logits @ support.T  # [B, K]
    log_q = weights.log_softmax(-1)
    torch.testing.assert_close(layer.log_prob(logits, support.unsqueeze(1)), log_q.T)
    torch.testing.assert_close(layer.mean(logits), log_q.exp() @ support)
    torch.testing.assert_close(layer.entropy(logits), -(log_q.exp() * log_q).sum(-1))
    torch.testing.assert_close(layer.kl(logits), (log_q.exp() * (log_q + n * math.log(2))).sum(-1))
    assert layer.kl(torch.zeros(1, *layer.shape)).abs().item() < 1e-6
    assert torch.equal(layer.argmax(logits), support[weights.argmax(-1)])
    assert torch.equal(layer.argmax(logits.view(2, 2, -1)), support[weights.argmax(-1)].view(2, 2, -1))
    torch.testing.assert_close(layer.relax(logits, 1e-3), support[weights.argmax(-1)])
    assert torch.equal(layer.indices(support), support[:, :n].long())
    assert torch.equal(layer.codes(layer.indices(support), torch.float64), support)
    assert torch.equal(layer.decoded(support), support[:, :n])
    other = layer.distribution(logits)
    torch.testing.assert_close(other.log_prob(support[:1].expand_as(logits)), log_q[:, 0])
    torch.testing.assert_close(other.mean, layer.mean(logits))
    torch.testing.assert_close(other.entropy(), layer.entropy(logits))
    assert other.sample((3,)).shape == (3, *logits.shape)


def test_gradients_of_log_z_are_the_marginals() -> None:
    layer = dgrad.latent("pairs:5")
    logits = small_logits(layer, batch=3).requires_grad_()
    log_z = -layer.log_prob(logits, torch.zeros(1, 1, *layer.shape, dtype=logits.dtype))
    (gradient,) = torch.autograd.grad(log_z.sum(), logits)
    torch.testing.assert_close(gradient, layer.mean(logits))
    assert torch.autograd.gradcheck(layer.kl, (logits,))


def test_samples_are_of_the_family_itself() -> None:
    """A chi-squared statistic below its 1 - 1e-6 quantile, which for 31 degrees of freedom is 87.2; noise on
    the bits alone exceeds it.
    """
    layer = dgrad.latent("pairs:5")
    logits, draws = small_logits(layer, batch=1), 20_000
    support = layer.enumerate(like=logits)
    expected = draws * layer.log_prob(logits, support.unsqueeze(1)).exp().squeeze(1)

    def statistic(codes: Tensor) -> float:
        number = layer.indices(codes).flatten(0, 1) @ (2 ** torch.arange(4, -1, -1))
        counts = torch.bincount(number, minlength=32)
        return float(((counts - expected).square() / expected).sum())

    assert statistic(layer.sample(logits, draws, generator=Generator().manual_seed(0))) < 87.2
    noise = layer.noise(logits, draws, generator=Generator().manual_seed(0))
    assert statistic(layer.argmax(logits + noise)) > 87.2, "documented: perturb-and-MAP is no draw of q"
    apart = logits.clone()
    apart[:, 5:] = 0
    expected = draws * layer.log_prob(apart, support.unsqueeze(1)).exp().squeeze(1)
    assert statistic(layer.argmax(apart + noise)) < 87.2, "without potentials of pairs it is one"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_kept_and_the_global_generator_stays(dtype: torch.dtype) -> None:
    layer = dgrad.latent("pairs:4")
    logits = small_logits(layer, batch=2).to(dtype)
    before = torch.get_rng_state()
    for result in (
        layer.sample(logits, generator=Generator().manual_seed(0)),
        layer.argmax(logits),
        layer.mean(logits),
    ):
        assert result.dtype == dtype
    assert layer.kl(logits).dtype == layer.entropy(logits).dtype == dtype
    noise = layer.noise(1e4 * logits, 50, generator=Generator().manual_seed(0))
    assert noise.dtype == torch.promote_types(dtype, torch.float32)
    assert noise.isfinite().all()
    assert (noise[..., 4:] == 0).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.registry().factories("estimators")))
def test_estimators_conform_where_they_do_not_refuse(name: str) -> None:
    layer = dgrad.latent("pairs:3")
    estimator = dgrad.estimator(name)
    if estimator.traits.supports(layer):
        check_estimator(estimator, layer)
    else:
        with pytest.raises(dgrad.DgradError, match="pairs:3"):
            estimator(layer, torch.zeros(2, *layer.shape), lambda codes: codes.sum(-1))


@pytest.mark.slow
def test_the_debiased_direct_is_rloo_with_two_samples_and_exact_where_its_surrogate_is() -> None:
    """The loss is linear in bits and products: without a ridge 64 samples of all settings alike tell all of it;
    4,000 draws.
    """
    layer, draws = dgrad.latent("pairs:4"), 4000
    weights = torch.randn(layer.shape, dtype=torch.float64, generator=Generator().manual_seed(5))
    logits = torch.zeros(draws, *layer.shape, dtype=torch.float64)

    def gradients(name: str, samples: int, **settings: float) -> Tensor:
        leaf = logits.clone().requires_grad_()
        estimator = dgrad.estimator(name, samples=samples, **settings)
        loss = estimator(layer, leaf, lambda codes: 3 + codes @ weights, generator=Generator().manual_seed(0)).loss
        return torch.autograd.grad(loss.sum(), leaf)[0]

    torch.testing.assert_close(gradients("direct-unbiased", 2), gradients("rloo", 2))
    exact = gradients("direct-unbiased", 64, ridge=1e-6).var(0).sum()
    assert exact < 0.01 * gradients("rloo", 64).var(0).sum()


def test_perturbed_codes_that_claim_to_be_draws_of_q_are_found_out() -> None:
    class Claims(type(dgrad.estimator("direct"))):  # type: ignore[misc]
        @property
        def traits(self) -> Traits:
            return replace(super().traits, perturbs=False)

    with pytest.raises(AssertionError, match="decoder"):
        check_estimator(Claims(), dgrad.latent("pairs:3"))


def test_potentials_are_the_losses_of_changed_bits() -> None:
    layer, bits = dgrad.latent("pairs:4"), 4
    logits = small_logits(layer, batch=3)
    codes = layer.sample(logits, 2, generator=Generator().manual_seed(0))
    for loss in small_objectives(layer).values():
        objective = as_objective(loss)
        table = objective.at(codes).potentials(layer)
        for bit in range(bits):
            on, off = layer.indices(codes), layer.indices(codes)
            on[..., bit], off[..., bit] = 1, 0
            change = objective(layer.codes(on, codes.dtype)) - objective(layer.codes(off, codes.dtype))
            torch.testing.assert_close(table[..., bit], change)
        assert (table[..., bits:] == 0).all()
    kl = KLObjective(layer, logits)
    sum_ = as_objective(small_objectives(layer)["cross-entropy"]) + 0.5 * kl
    changed = layer.moves.neighbours(codes)
    for objective in (kl, sum_, SweepCache(sum_, {})):
        table = objective.at(codes).potentials(layer)
        by_potentials = ((changed - codes) * table).flatten(3).sum(-1)  # <T, z'> - <T, z>
        torch.testing.assert_close(by_potentials, objective(changed.flatten(0, 1)).view(bits, 2, 3) - objective(codes))
    assert torch.equal(kl.at(codes).potentials(layer)[0], logits), (
        "log q is linear in the code: they are exact for any change"
    )


def test_direct_is_the_papers_algorithm() -> None:
    """One-hot bits, Gumbel noise on each, every setting tried by brute force, the loss of the changed bits on
    top: as the authors' code.
    """
    layer, n, epsilon = dgrad.latent("pairs:4"), 4, 0.7
    logits = small_logits(layer, batch=6).requires_grad_()
    loss = small_objectives(layer)["cross-entropy"]
    estimator = dgrad.estimator("direct", epsilon=epsilon)
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    noise = layer.noise(logits.detach(), generator=Generator().manual_seed(0))[0]
    support = _support(n)

    def solve(of_values: Tensor, of_pairs: Tensor) -> Tensor:
        best, code = -math.inf, support[0]
        for each in support:
            score = sum(float(of_values[i, int(each[i])]) for i in range(n)) + float(each[n:] @ of_pairs)
            best, code = (score, each) if score > best else (best, code)
        return code

    for example in range(6):
        of_values = torch.zeros(n, 2, dtype=torch.float64)
        of_values[:, 1] = logits[example, :n].detach() + noise[example, :n]
        first = solve(of_values, logits[example, n:].detach())
        losses = torch.zeros(n, 2, dtype=torch.float64)
        for i, value in itertools.product(range(n), (0, 1)):
            bits = [int(bit) for bit in first[:n]]
            bits[i] = value
            losses[i, value] = loss(torch.tensor(_code(tuple(bits)), dtype=torch.float64)[None, None])
        second = solve(of_values - float(estimator.epsilon) * losses, logits[example, n:].detach())
        assert torch.equal(estimate.codes[0, example], first)
        torch.testing.assert_close(gradient[example], (first - second) / float(estimator.epsilon))
    assert (gradient[:, n:] != 0).any(), "potentials of pairs learn too"
    assert estimator.traits.evaluations(layer) == n + 1


def test_direct_rb_is_direct_with_a_gumbel_for_every_setting_in_the_mean() -> None:
    """Of one code's potentials: 40,000 draws of all settings' noise against the closed form, in 5 standard
    errors (60 numbers: a false alarm in 29,000 seeds).
    """
    layer, epsilon, draws = dgrad.latent("pairs:4"), 0.7, 40_000
    logits = small_logits(layer, batch=6).requires_grad_()
    loss = small_objectives(layer)["cross-entropy"]
    estimator = dgrad.estimator("direct-rb", epsilon=epsilon)
    estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    table = as_objective(loss).at(estimate.codes).potentials(layer)[0]  # [B, *code]
    support, plain = _support(4), logits.detach()
    noise = gumbel(torch.zeros(6, len(support), dtype=torch.float64), draws, generator=Generator().manual_seed(1))
    drawn, perturbed = (support[(u @ support.T + noise).argmax(-1)] for u in (plain, plain - epsilon * table))
    direct = (drawn - perturbed) / epsilon  # [draws, B, *code]
    error = direct.std(0) / draws**0.5
    assert ((direct.mean(0) - gradient).abs() <= 5 * error + 1e-12).all()
    assert estimator.traits.evaluations(layer) == 4 + 1


def test_direct_rb_is_exact_for_a_loss_that_is_linear_in_the_bits_as_epsilon_falls() -> None:
    layer = dgrad.latent("pairs:5")
    logits, slope = small_logits(layer, batch=4).requires_grad_(), small_logits(layer, batch=4, seed=1)[:, :5]

    def loss(codes: Tensor) -> Tensor:
        return (slope * codes[..., :5]).sum(-1)

    gradients = []
    for estimator in (dgrad.estimator("direct-rb", epsilon=1e-4, difference="central"), dgrad.estimator("exact")):
        estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(0))
        gradients += torch.autograd.grad(estimate.loss.sum(), logits)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
    # with the KL inside and epsilon 1 it leads to the posterior, whatever the logits are now
    with_kl = as_objective(loss) + KLObjective(layer, logits)
    estimate = dgrad.estimator("direct-rb", epsilon=1.0)(layer, logits, with_kl, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    posterior = torch.zeros_like(logits)
    posterior[:, :5] = -slope
    torch.testing.assert_close(gradient, layer.mean(logits) - layer.mean(posterior))


@torch.no_grad()
def test_a_drawn_bound_agrees_with_the_sum_over_all_codes() -> None:
    torch.manual_seed(0)
    layer = dgrad.latent("pairs:9")  # more codes than are summed over
    model = mlp_vae(layer, (1, 4, 4), likelihood("bernoulli"), (8,))
    assert model.decoder.first.in_features == 9, "the decoder sees the bits, not their products"
    images = (torch.rand(20, 1, 4, 4) < 0.5).float()
    drawn = evaluate_bound(model, Split(images), samples=500, generator=evaluation_generator(torch.device("cpu"), 0))
    posterior = model.posterior(images)
    support = layer.enumerate(like=posterior.logits).unsqueeze(1)
    losses = model.reconstruction(images)(support)
    exact = (layer.log_prob(posterior.logits, support).exp() * losses).sum(0).mean() + layer.kl(posterior.logits).mean()
    assert abs(drawn.bound - float(exact)) < 5 * drawn.standard_error


@pytest.mark.slow
def test_it_trains_and_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def dgrad_(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
            main([str(argument) for argument in arguments])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, capsys.readouterr().err

    run = tmp_path / "run"
    code, err = dgrad_("train", "--latent", "pairs:6", "--estimator", "direct", "--epochs", 2, "--quiet", "--out", run)
    assert code == 0, err
    assert json.loads(Run(run).summary_file.read_text())["test_bound"] < 60
    assert dgrad_("evaluate", run, "--importance-samples", 10)[0] == 0
    assert dgrad_("export", run, "--out", tmp_path / "model")[0] == 0, "compared with torch before it is put in place"
    assert dgrad_("train", "--latent", "pairs:6", "--estimator", "leg", "--out", tmp_path / "other")[0] == 2
    for spec in ("pairs:0", "pairs:17", "pairs:x", "pairs:"):
        code, err = dgrad_("train", "--latent", spec, "--out", tmp_path / "other")
        assert (code, err.count("\n")) == (2, 1), spec


def test_layers_that_do_not_say_how_to_change_a_variable_are_refused() -> None:
    class Silent(Pairs):
        moves = None

    with pytest.raises(dgrad.InputError, match="does not say how: take rloo"):
        dgrad.estimator("direct")(Silent(3), torch.zeros(1, 6), lambda codes: codes.sum(-1))
