"""The fast sweeps against the decoder evaluated on every changed code, one by one, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import dgrad
from benchmarks.naive import naive_sweep
from dgrad.config import configure
from dgrad.core.evaluations import Evaluation
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import FunctionObjective
from dgrad.core.wrapped_objectives import SweepCache, in_dtype
from dgrad.kernels import code_sweeps as sweeps
from dgrad.training.labels import LabelObjective, ObservedObjective
from dgrad.training.trainer import Trainer
from dgrad.vae import reconstruction as reconstruction_module
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.networks import Decoder
from dgrad_plugins.models._dense import linear_vae, mlp_vae
from dgrad_plugins.models._mixture import mixture_vae

SHAPES = [("1x2", 1), ("3x2", 7), ("2x3", 8), ("4x5", 64), ("1x40", 30), ("20x10", 784)]


def _problem(
    spec: str, pixels: int, *, samples: int = 2, batch: int = 3, scale: float = 1.0, grey: bool = False
) -> tuple[DiscreteVAE, Tensor, Tensor]:
    """A linear model, codes and images, the same each time."""
    generator = Generator().manual_seed(0)
    layer = dgrad.latent(spec)
    model = linear_vae(layer, (1, 1, pixels), likelihood("bernoulli"))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    codes = layer.sample(torch.zeros(batch, *layer.shape), samples, generator=generator)
    images = torch.rand(batch, 1, 1, pixels, generator=generator)
    return model, codes, images if grey else images.round()


def _enumerated(model: DiscreteVAE, codes: Tensor, images: Tensor) -> Tensor:
    """The definition: each code changed, each decoded, in float64."""
    model.double()
    truth = FunctionObjective(model.reconstruction(images.double()), codes_per_call=512).sweep(codes.double())
    model.float()
    return truth


def _close(sweep: Tensor, truth: Tensor, magnitude: float = 0.0) -> None:
    """Within 1e-4 nats, and the rounding of float32 where the numbers themselves are larger than it resolves."""
    tolerance = 1e-4 + 3e-7 * truth.abs() + 3e-7 * magnitude
    worst = ((sweep.double() - truth).abs() / tolerance).max()
    assert worst <= 1, f"{float(worst):.2f} times the tolerance"


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("scale", [0.1, 0.7])
@pytest.mark.parametrize(("spec", "pixels"), SHAPES)
def test_the_linear_bernoulli_sweep_is_the_enumerated_one(spec: str, pixels: int, scale: float, grey: bool) -> None:
    model, codes, images = _problem(spec, pixels, scale=scale, grey=grey)
    _close(model.reconstruction(images).sweep(codes), _enumerated(model, codes, images))


@pytest.mark.parametrize("form", [sweeps._grouped_change, sweeps._exact_change])
def test_both_forms_agree(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, codes, images = _problem("20x10", 100, scale=0.5)
    truth = _enumerated(model, codes, images)
    monkeypatch.setattr(sweeps, "_grouped_change", form)
    monkeypatch.setattr(sweeps, "_exact_change", form)
    monkeypatch.setattr(sweeps, "NUMBERS_AT_ONCE", 1500)  # several parts, the last one short
    _close(model.reconstruction(images).sweep(codes), truth)


@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0, 1e4, -1e4])
@pytest.mark.parametrize("weight", [0.3, 5.0, 50.0, 1e4])
def test_extreme_weights_and_biases(weight: float, bias: float) -> None:
    model, codes, images = _problem("5x3", 61, scale=0.1)
    with torch.no_grad():
        model.decoder.first.weight.mul_(weight / 0.1)
        model.decoder.first.bias.add_(bias * torch.randn(61, generator=Generator().manual_seed(3)))
    magnitude = 61 * (5 * 3 * weight + 3 * abs(bias))
    _close(model.reconstruction(images).sweep(codes), _enumerated(model, codes, images), magnitude)


@pytest.mark.parametrize(("spread", "grouped"), [(59.0, True), (61.0, False)])
def test_the_grouped_form_is_left_where_a_product_could_overflow(
    spread: float, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pixels whose weights spread over just less, and just more, than the limit."""
    model, codes, images = _problem("2x3", 8)
    with torch.no_grad():
        model.decoder.first.weight.zero_()
        model.decoder.first.weight[:, 0] = spread / 8
    used = []
    for name in ("_grouped_change", "_exact_change"):
        original = getattr(sweeps, name)
        monkeypatch.setattr(
            sweeps, name, lambda *args, name=name, original=original: used.append(name) or original(*args)
        )
    _close(model.reconstruction(images).sweep(codes), _enumerated(model, codes, images))
    assert used == ["_grouped_change" if grouped else "_exact_change"]


@pytest.mark.parametrize("by_support", [False, True])
@pytest.mark.parametrize("name", ["bernoulli", "squared-error"])
@pytest.mark.parametrize("hidden", [(7,), (9, 6)])
@pytest.mark.parametrize("spec", ["1x5", "3x2", "4x3"])
def test_the_sweep_of_deeper_decoders(
    spec: str, hidden: tuple[int, ...], name: str, by_support: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As differences of the first layer's outputs, and looked up among all codes."""
    monkeypatch.setattr(reconstruction_module, "support_is_smaller", lambda codes: by_support)
    layer = dgrad.latent(spec)
    torch.manual_seed(0)
    model = mlp_vae(layer, (1, 4, 5), likelihood(name), hidden)
    codes = layer.sample(torch.zeros(3, *layer.shape), 2, generator=Generator().manual_seed(0))
    images = torch.rand(3, 1, 4, 5, generator=Generator().manual_seed(1))
    _close(model.reconstruction(images).sweep(codes), _enumerated(model, codes, images))


@pytest.mark.parametrize(
    ("spec", "smaller"), [("1x40", True), ("2x3", True), ("4x3", True), ("5x3", False), ("20x10", False)]
)
def test_the_support_is_looked_up_where_it_has_fewer_codes_than_there_are_changes(
    spec: str, smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """81 codes against 11 * 4 * 2 changes of eleven examples; 243 against 110."""
    layer = dgrad.latent(spec)
    model = mlp_vae(layer, (1, 4, 5), likelihood("bernoulli"), (7,))
    evaluated = []
    original = model.decoder.rest.forward
    monkeypatch.setattr(
        model.decoder.rest, "forward", lambda hidden: evaluated.append(hidden[..., 0].numel()) or original(hidden)
    )
    codes = layer.sample(torch.zeros(11, *layer.shape), generator=Generator().manual_seed(0))
    model.reconstruction(torch.rand(11, 1, 4, 5)).sweep(codes)
    n, k = layer.shape
    assert sum(evaluated) == 11 + (k**n if smaller else 11 * n * (k - 1)), "the codes themselves are evaluated too"


@pytest.mark.parametrize(("budget", "calls"), [(1, 27), (5_000, 1), (300, 14)])
def test_the_sweep_by_support_keeps_to_its_budget(budget: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 27 numbers of 4 bytes for each of 27 codes, 300 bytes are two codes."""
    monkeypatch.setattr(sweeps, "BYTES_PER_CALL", budget)
    cost = torch.randn(5, 3, 3, generator=Generator().manual_seed(0))
    codes = dgrad.latent("3x3").sample(torch.zeros(5, 3, 3), 2, generator=Generator().manual_seed(1))
    sizes = []

    def losses_of(values: Tensor) -> Tensor:
        sizes.append(len(values))
        return torch.einsum("rnk,bnk->rb", F.one_hot(values, 3).float(), cost)

    table = sweeps.support_sweep(codes, losses_of, numbers_per_code=27)
    assert len(sizes) == calls
    assert sum(sizes) == 27
    _close(table, FunctionObjective(lambda codes: (codes * cost).sum((-2, -1))).sweep(codes))


@pytest.mark.parametrize("budget", [1, 5_000, 10**9])
def test_the_difference_sweep_keeps_to_its_budget(budget: int) -> None:
    """Calls are as large as the budget allows, never smaller than one change of each example, and change nothing."""
    layer = dgrad.latent("4x3")
    model = mlp_vae(layer, (1, 4, 5), likelihood("bernoulli"), (7,))
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    images = torch.rand(3, 20, generator=Generator().manual_seed(1)).round()
    codes = layer.sample(torch.zeros(3, *layer.shape), 2, generator=Generator().manual_seed(0))
    changes_of_call = []

    def rest_loss(hidden: Tensor) -> Tensor:
        changes_of_call.append(len(hidden) // 2)
        return model.likelihood.loss(decoder.rest(hidden), images)

    with torch.no_grad():
        hidden = decoder.first(codes.flatten(-2))
        loss = rest_loss(hidden)
        changes_of_call.clear()
        sweep = sweeps.difference_sweep(
            codes,
            *Evaluation(FunctionObjective(rest_loss), codes, loss).changes(
                torch.arange(codes.shape[2]).expand(codes.shape[:3])
            ),
            decoder.first.weight,
            hidden,
            rest_loss,
            loss,
            numbers_per_code=decoder.numbers_per_code,
            bytes_per_call=budget,
        )
    allowed = min(8, max(1, budget // (4 * 2 * 3 * (7 + 20))))  # float32, two samples of three images, 27 numbers each
    assert max(changes_of_call) == allowed
    assert sum(changes_of_call) == 4 * 2
    _close(sweep, _enumerated(model, codes, images.view(3, 1, 4, 5)))


@pytest.mark.parametrize("spec", ["3x4", "1x12"])
def test_a_decoder_of_ones_own_gets_the_generic_sweep(spec: str) -> None:
    """Or, with few codes, all of them looked up."""
    layer = dgrad.latent(spec)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Flatten(-2), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6))
    model = DiscreteVAE(layer, (1, 2, 3), likelihood("bernoulli"), nn.Identity(), decoder)
    assert not isinstance(model.decoder, Decoder)
    codes = layer.sample(torch.zeros(3, *layer.shape), 2, generator=Generator().manual_seed(0))
    images = torch.rand(3, 1, 2, 3, generator=Generator().manual_seed(1))
    _close(model.reconstruction(images).sweep(codes), _enumerated(model, codes, images))


def _rows_problem(kind: str) -> tuple[DiscreteVAE, Tensor, Tensor, Tensor | None]:
    """A model in float64, codes `[2, 7, 4, 3]`, images and Gaussian variables."""
    layer = dgrad.latent("4x3")
    torch.manual_seed(0)
    model = {
        "linear": lambda: linear_vae(layer, (1, 4, 5), likelihood("bernoulli")),
        "linear, squared error": lambda: linear_vae(layer, (1, 4, 5), likelihood("squared-error")),
        "mlp": lambda: mlp_vae(layer, (1, 4, 5), likelihood("bernoulli"), (7,)),
        "mixture": lambda: mixture_vae(layer, (1, 4, 5), likelihood("bernoulli"), (7,), gaussian=2, dropout=0.0),
        "own": lambda: DiscreteVAE(
            layer,
            (1, 4, 5),
            likelihood("bernoulli"),
            nn.Identity(),
            nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(12, 20)),
        ),
    }[kind]().double()
    codes = layer.sample(torch.zeros(7, 4, 3, dtype=torch.float64), 2, generator=Generator().manual_seed(0))
    images = torch.rand(7, 1, 4, 5, dtype=torch.float64, generator=Generator().manual_seed(1)).round()
    gaussian = torch.randn(7, 2, dtype=torch.float64) if kind == "mixture" else None
    return model, codes, images, gaussian


@pytest.mark.parametrize("few_codes", [False, True])
@pytest.mark.parametrize("kind", ["linear", "linear, squared error", "mlp", "mixture", "own"])
def test_the_sweep_of_some_rows_is_the_sweep_there_and_the_loss_elsewhere(
    kind: str, few_codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a sum, scaled, in another precision, with known labels and with a cache; a row may come twice."""
    monkeypatch.setattr(reconstruction_module, "support_is_smaller", lambda codes, rows=None: few_codes)
    model, codes, images, gaussian = _rows_problem(kind)
    layer = model.layer
    rows = torch.randint(4, (2, 7, 2), generator=Generator().manual_seed(2))
    assert (rows[..., 0] == rows[..., 1]).any()
    swept = (rows.unsqueeze(-1) == torch.arange(4)).any(-2).unsqueeze(-1)  # [S, B, n, 1]
    kl = KLObjective(layer, torch.randn(7, 4, 3, dtype=torch.float64))
    known = torch.rand(7, 4, 1, generator=Generator().manual_seed(3)) < 0.3
    held = layer.sample(torch.zeros(7, 4, 3, dtype=torch.float64), generator=Generator().manual_seed(4))[0]
    reconstruction = model.reconstruction(images, gaussian)
    for objective in (
        reconstruction,
        reconstruction + 0.5 * kl,
        in_dtype(reconstruction, torch.float64),
        ObservedObjective(reconstruction, known, held),
        SweepCache(reconstruction, {}),
        FunctionObjective(reconstruction, codes_per_call=20),
    ):
        at = objective.at(codes)
        torch.testing.assert_close(at.loss, objective(codes))
        expected = torch.where(swept, objective.sweep(codes), at.loss.detach()[..., None, None])
        torch.testing.assert_close(at.sweep_rows(rows), expected)


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [("linear", True), ("linear, squared error", False), ("mlp", False), ("mixture", False), ("own", False)],
)
def test_where_nothing_is_gained_by_leaving_rows_out(kind: str, at_once: bool) -> None:
    """With a linear Bernoulli decoder, and with no more codes than changes.

    There are 81 codes here, 14 * 2 changes of one row and 14 * 6 of three.
    """
    model, codes, images, gaussian = _rows_problem(kind)
    reconstruction = model.reconstruction(images, gaussian)
    kl = KLObjective(model.layer, torch.zeros(7, 4, 3, dtype=torch.float64))
    known = torch.zeros(7, 4, 1, dtype=torch.bool)
    for objective in (
        reconstruction,
        reconstruction + 0.5 * kl,
        in_dtype(reconstruction, torch.float64),
        ObservedObjective(reconstruction, known, codes[0]) + LabelObjective(1.0, torch.zeros(7, 4, dtype=torch.long)),
        SweepCache(reconstruction, {}),
    ):
        assert objective.at(codes).full_sweep_is_free(1) == at_once
        assert objective.at(codes).full_sweep_is_free(3) == (kind != "mixture")
    assert not FunctionObjective(reconstruction).at(codes).full_sweep_is_free(3)


@pytest.mark.parametrize("kind", ["mlp", "own"])
def test_the_sweep_of_some_rows_evaluates_no_others(kind: str) -> None:
    model, codes, images, _ = _rows_problem(kind)
    evaluated = []
    module = model.decoder.rest if isinstance(model.decoder, Decoder) else model.decoder[2]
    module.register_forward_hook(lambda _, inputs, __: evaluated.append(inputs[0][..., 0].numel()))
    at = model.reconstruction(images).at(codes)
    assert evaluated == [14]
    at.sweep_rows(torch.tensor([2]).expand(2, 7, 1))
    assert sum(evaluated) == 14 + 14 * 2, "two other values of one row of 14 codes"


@pytest.mark.parametrize("name", ["bernoulli", "squared-error"])
def test_the_loss_everywhere_is_that_of_each_example_with_its_gradient(name: str) -> None:
    """A decoder runs once for each code, alone, in a sum, scaled and in another precision."""
    layer = dgrad.latent("2x3")
    torch.manual_seed(0)
    model = mlp_vae(layer, (1, 4, 5), likelihood(name), (7,)).double()
    images = torch.rand(5, 1, 4, 5, dtype=torch.float64)
    logits = torch.randn(5, 2, 3, dtype=torch.float64)
    support = layer.enumerate(like=logits)
    weights = torch.randn(9, 5, dtype=torch.float64)
    rows = []
    hook = model.decoder.rest.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    objective = model.reconstruction(images) + 0.5 * KLObjective(layer, logits)
    for each, codes in (
        (objective, support),
        (SweepCache(objective, {}), support),
        (in_dtype(objective, torch.float64), support.float()),
    ):
        grads = []
        for losses in (each.everywhere(codes, 5), each(codes.unsqueeze(1).expand(-1, 5, -1, -1))):
            assert losses.dtype == codes.dtype
            model.zero_grad()
            (losses * weights).sum().backward()
            grads.append([losses.detach(), *(parameter.grad.clone() for parameter in model.decoder.parameters())])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)
    hook.remove()
    assert rows == 3 * [9, 45]


@pytest.mark.parametrize("spec", ["1x12", "6x6"])
@pytest.mark.parametrize("own_decoder", [False, True])
def test_a_sweep_in_bfloat16_is_that_of_float32_but_for_rounding(spec: str, own_decoder: bool) -> None:
    """By looking up and by differences; the loss of the codes themselves and its gradient stay in float32."""
    layer = dgrad.latent(spec)
    torch.manual_seed(0)
    model = mlp_vae(layer, (1, 4, 5), likelihood("bernoulli"), (64,))
    if own_decoder:
        model.decoder = nn.Sequential(
            nn.Flatten(-2), nn.Linear(layer.shape[0] * layer.shape[1], 64), nn.ReLU(), nn.Linear(64, 20)
        )
    codes = layer.sample(torch.zeros(30, *layer.shape), generator=Generator().manual_seed(0))
    images = torch.rand(30, 1, 4, 5, generator=Generator().manual_seed(1))
    last = next(module for module in reversed(list(model.decoder.modules())) if isinstance(module, nn.Linear))
    dtypes = []
    last.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))

    def swept() -> tuple[Tensor, Tensor]:
        at = model.reconstruction(images).at(codes)
        assert dtypes.pop() == torch.float32
        return at.loss.detach(), at.sweep()

    loss, exact = swept()
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    model.sweep_dtype = torch.bfloat16
    again, rounded = swept()
    assert set(dtypes) == {torch.bfloat16}
    assert torch.equal(loss, again)
    assert rounded.dtype == torch.float32
    changes, errors = exact - loss[..., None, None], rounded - exact
    assert 0 < errors.std() < 0.05 * changes.std()


def test_non_contiguous_codes() -> None:
    model, codes, images = _problem("4x5", 20)
    strange = codes.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strange.is_contiguous()
    objective = model.reconstruction(images)
    assert torch.equal(objective.sweep(strange), objective.sweep(codes))


def test_an_evaluation_sweeps_its_own_codes() -> None:
    """Whatever the objective has evaluated since."""
    model, codes, images = _problem("4x5", 20)
    layer = model.layer
    logits = torch.randn(3, 4, 5, generator=Generator().manual_seed(2))
    other = layer.sample(logits, 2, generator=Generator().manual_seed(9))

    def fresh() -> dgrad.Objective:
        return model.reconstruction(images) + 0.5 * KLObjective(layer, logits)

    expected = fresh().sweep(codes)
    objective = fresh()
    at, at_other = objective.at(codes), objective.at(other)
    torch.testing.assert_close(at.sweep(), expected)
    torch.testing.assert_close(at_other.sweep(), fresh().sweep(other))
    torch.testing.assert_close(at.sweep(), expected)


def test_the_sweep_of_the_kl_is_closed_form() -> None:
    layer = dgrad.latent("3x4")
    logits = torch.randn(5, 3, 4, dtype=torch.float64, generator=Generator().manual_seed(0))
    codes = layer.sample(logits, 2, generator=Generator().manual_seed(1))
    objective = KLObjective(layer, logits)
    torch.testing.assert_close(objective.sweep(codes), FunctionObjective(objective).sweep(codes))
    support = layer.enumerate(like=logits).unsqueeze(1).expand(-1, 5, -1, -1)
    mean = (layer.log_prob(logits, support).exp() * objective(support)).sum(0)
    torch.testing.assert_close(mean, layer.kl(logits))


def test_the_naive_reference_of_the_benchmarks_is_the_same_sweep() -> None:
    model, codes, images = _problem("4x5", 64, samples=1)
    assert isinstance(model.decoder, Decoder)
    with torch.no_grad():
        naive = naive_sweep(model.decoder.first, codes[0], images.flatten(1))
    torch.testing.assert_close(model.reconstruction(images).sweep(codes)[0], naive, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_precision_of_a_runs_sweeps_is_the_one_that_was_asked_for() -> None:
    config = configure({"model": "mlp", "sweep-precision": "bfloat16", "epochs": 1})
    assert Trainer(config).model.sweep_dtype == torch.bfloat16
