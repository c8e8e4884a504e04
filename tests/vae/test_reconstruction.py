"""Objectives of a decoder's outputs: any module, its losses, and its sweeps in the fastest way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Generator, Tensor, nn

import dgrad
from dgrad.core.objectives import FunctionObjective
from dgrad.core.random import RandomState
from dgrad.vae import reconstruction
from dgrad.vae.reconstruction import DecoderObjective
from tests.helpers import with_layer

BATCH, PIXELS = 5, 6


class Own(nn.Module):
    """A decoder with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, PIXELS)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layer(codes.flatten(1)).tanh()


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, PIXELS),
    "linear without bias": lambda: nn.Linear(12, PIXELS, bias=False),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, PIXELS)),
    "hidden": lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, PIXELS)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(12, 9), nn.Tanh()), nn.Linear(9, PIXELS)),
    "images": lambda: nn.Sequential(nn.Linear(12, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, (1, 2))),
    "own": Own,
    "embedding": lambda: nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(12, PIXELS)),
}
LINEAR = ("linear", "linear without bias", "flattened")
"""The sweep of these is nearly free with Bernoulli outputs."""
LOSSES: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "bernoulli": dgrad.bernoulli,
    "squared error": dgrad.squared_error,
    "function": lambda x: lambda outputs: (outputs.flatten(2) - x).abs().sum(-1),
}


def _problem(decoder: str, spec: str = "3x4", *, samples: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = dgrad.latent(spec)
    codes = layer.sample(torch.zeros(BATCH, *layer.shape), samples, generator=Generator().manual_seed(0))
    return DECODERS[decoder](), codes, torch.rand(BATCH, PIXELS)


def _by_hand(decoder: nn.Module, loss: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    outputs = decoder(codes.flatten(2).flatten(0, 1)).unflatten(0, codes.shape[:2])
    return loss(outputs)


@pytest.mark.filterwarnings("default:the fast sweep could not be compiled")
@pytest.mark.parametrize("compiled", [False, None])
@pytest.mark.parametrize("spec", ["3x4", "1x12"])
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_the_sweep_and_the_gradient_are_those_of_the_decoder(
    name: str, loss_name: str, spec: str, compiled: bool | None
) -> None:
    decoder, codes, x = _problem(name, spec)
    loss = LOSSES[loss_name](x)
    objective = dgrad.objective(decoder=decoder, loss=loss, compiled=compiled)
    plain = FunctionObjective(lambda codes: _by_hand(decoder, loss, codes), codes_per_call=40)
    rows = torch.zeros(2, BATCH, 1, dtype=torch.long)
    ours, theirs = objective.at(codes), plain.at(codes)
    for one, other in (
        (ours.loss, theirs.loss),
        (objective(codes), theirs.loss),
        (ours.sweep(), theirs.sweep()),
        (ours.sweep_rows(rows), theirs.sweep_rows(rows)),
        (objective.everywhere(codes[0], BATCH), plain.everywhere(codes[0], BATCH)),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        *(torch.autograd.grad(at.loss.sum(), list(decoder.parameters())) for at in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert ours.full_sweep_is_free(1) == (spec == "1x12" or (name in LINEAR and loss_name == "bernoulli"))


def test_relaxed_codes_have_their_gradient() -> None:
    decoder, codes, x = _problem("linear")
    soft = (codes + 0.1).requires_grad_()
    slopes = [
        torch.autograd.grad(loss.sum(), soft)[0]
        for loss in (
            dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))(soft),
            _by_hand(decoder, dgrad.bernoulli(x), soft),
        )
    ]
    torch.testing.assert_close(*slopes)


def test_a_sweep_runs_the_first_layer_once_and_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine layers' outputs and six pixels are 60 bytes, ten codes 600."""
    decoder, codes, x = _problem("hidden")
    first: list[int] = []
    last: list[int] = []
    linear = nn.functional.linear

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is decoder[0].weight:
            first.append(len(inputs))
        return linear(inputs, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)  # with a hook it would be called as it is
    decoder[2].register_forward_hook(lambda _, inputs, __: last.append(len(inputs[0])))
    objective = dgrad.objective(decoder=decoder, loss=dgrad.squared_error(x), bytes_per_call=1200)
    objective.at(codes).changed(torch.arange(3).expand(2, BATCH, 3))
    assert first == [10]
    assert last == [10, 20, 20, 20, 20, 10]


def test_a_module_with_hooks_is_called_as_it_is() -> None:
    decoder, codes, x = _problem("hidden")
    calls: list[int] = []
    decoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    assert isinstance(objective, DecoderObjective)
    assert objective.first is None
    objective(codes)
    assert calls == [10]


def _doubled(inputs: Tensor) -> Tensor:
    return 2 * inputs


@pytest.mark.parametrize("hidden", [False, True], ids=["alone", "in front"])
@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_a_first_layer_that_does_more_is_called_as_it_is(way: str, hidden: bool) -> None:
    """A sweep by its columns, or a kernel of its weights, would leave out what hooks do."""
    decoder, codes, x = _problem("hidden" if hidden else "linear")
    first = decoder[0] if isinstance(decoder, nn.Sequential) else decoder
    if way == "hook":
        first.register_forward_hook(lambda _, __, outputs: _doubled(outputs))
    elif way == "pre-hook":
        first.register_forward_pre_hook(lambda _, inputs: _doubled(inputs[0]))
    else:
        plain = first.forward
        first.forward = lambda inputs: _doubled(plain(inputs))
    at = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x)).at(codes)
    by_hand = FunctionObjective(lambda changed: _by_hand(decoder, dgrad.bernoulli(x), changed)).at(codes)
    torch.testing.assert_close(at.loss, by_hand.loss)
    torch.testing.assert_close(at.sweep(), by_hand.sweep())


def test_a_forward_that_accelerate_wraps_in_autocast_is_still_fast() -> None:
    decoder, _, x = _problem("linear")
    decoder._original_forward = decoder.forward
    decoder.forward = torch.autocast("cpu", torch.bfloat16)(decoder.forward)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    assert isinstance(objective, DecoderObjective)
    assert objective.first is decoder


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
@pytest.mark.parametrize("spec", ["3x4", "1x12"])
@pytest.mark.parametrize("loss", ["bernoulli", "squared error"])
def test_data_of_other_dtypes_are_the_same_data(dtype: torch.dtype, spec: str, loss: str) -> None:
    decoder, codes, x = _problem("linear", spec)
    x = x.round()
    of_floats = dgrad.objective(decoder=decoder, loss=LOSSES[loss](x))
    of_others = dgrad.objective(decoder=decoder, loss=LOSSES[loss](x.to(dtype)))
    torch.testing.assert_close(of_others.sweep(codes), of_floats.sweep(codes), check_dtype=False)
    every = codes[:, 0]
    torch.testing.assert_close(
        of_others.everywhere(every, BATCH), of_floats.everywhere(every, BATCH), check_dtype=False
    )


def test_codes_of_half_precision_are_swept_under_autocast() -> None:
    """Logits of an encoder under autocast are bfloat16, and so are codes."""
    decoder, codes, x = _problem("linear")
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    with torch.autocast("cpu", torch.bfloat16):
        sweep = objective.sweep(codes.bfloat16())
    torch.testing.assert_close(sweep, objective.sweep(codes), atol=0.05, rtol=0)


def test_data_with_a_gradient_get_it() -> None:
    """The compiled kernel of a linear decoder gives the data none."""
    decoder, codes, x = _problem("linear")
    data = x.requires_grad_()
    (slope,) = torch.autograd.grad(dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(data))(codes).sum(), data)
    # d/dx of -sum_d x_d a_d
    torch.testing.assert_close(slope, -decoder(codes.flatten(2)).sum(0).detach())


def test_what_is_no_decoder_no_loss_and_no_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who run no type checker
    decoder, _, x = _problem("linear")
    function: Any = torch.tanh
    with pytest.raises(
        dgrad.InputError, match=r"the decoder is a \w+; expected a torch.nn.Module: for a function write"
    ):
        dgrad.objective(decoder=function, loss=dgrad.bernoulli(x))
    data: Any = x
    with pytest.raises(dgrad.InputError, match=r"the loss is a Tensor; expected a function of the decoder's outputs"):
        dgrad.objective(decoder=decoder, loss=data)
    rows: Any = x.tolist()
    with pytest.raises(
        dgrad.InputError, match=r"data of type list; expected a tensor \[batch, ...\]: .* torch.as_tens"
    ):
        dgrad.bernoulli(rows)
    with pytest.raises(dgrad.InputError, match="the decoder returned a tuple; expected a tensor of outputs"):
        dgrad.objective(decoder=nn.GRU(4, 5), loss=dgrad.squared_error(x))(_problem("linear")[1])


def test_a_decoder_of_another_width_or_dtype_is_refused() -> None:
    decoder, codes, x = _problem("linear")
    with pytest.raises(
        dgrad.InputError, match=r"linear layer of 13 inputs, and a code \[3, 4\] has 12 numbers; expected"
    ):
        dgrad.objective(decoder=nn.Linear(13, PIXELS), loss=dgrad.bernoulli(x))(codes)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    with pytest.raises(dgrad.InputError, match=r"codes of torch.float64, .* for a decoder of torch.float32; expected"):
        objective(codes.double())


def test_a_decoder_that_wants_flat_codes_and_gets_others_says_what_to_do() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(12, PIXELS)

        def forward(self, codes: Tensor) -> Tensor:
            return self.network(codes)

    _, codes, x = _problem("linear")
    with pytest.raises(dgrad.InputError, match=r"cannot be multiplied.*nn\.Sequential\(nn\.Flatten\(\), decoder\)"):
        dgrad.objective(decoder=Wrapped(), loss=dgrad.bernoulli(x))(codes)
    dgrad.objective(decoder=nn.Sequential(nn.Flatten(), Wrapped()), loss=dgrad.bernoulli(x))(codes)


def test_rows_that_a_linear_layer_takes_one_by_one_are_not_flattened() -> None:
    """`nn.Linear(k, ...)` of `n` rows: the outputs are `[n, pixels]`."""
    decoder, codes, x = nn.Linear(4, 2), _problem("linear")[1], torch.rand(BATCH, 3, 2)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    plain = FunctionObjective(lambda codes: dgrad.bernoulli(x)(decoder(codes)))
    torch.testing.assert_close(objective.sweep(codes), plain.sweep(codes))


@pytest.mark.parametrize("loss_name", ["bernoulli", "function"])
@pytest.mark.parametrize("spec", ["3x4", "1x12"])
@pytest.mark.parametrize("begins_linear", [True, False])
def test_a_sweep_through_dropout_has_one_mask_for_each_example(begins_linear: bool, spec: str, loss_name: str) -> None:
    _, codes, x = _problem("linear", spec)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(12, 32), nn.Dropout(0.5), nn.Linear(32, PIXELS))
    if not begins_linear:
        decoder = nn.Sequential(nn.Identity(), nn.Flatten(), decoder)
    loss = LOSSES[loss_name](x)
    objective = dgrad.objective(decoder=decoder, loss=loss)
    state = RandomState(codes.device)
    at = objective.at(codes)
    assert not at.full_sweep_is_free(1)
    sweep = at.sweep()
    assert at.vectorises
    expected = FunctionObjective(lambda codes: state.again(lambda: _by_hand(decoder, loss, codes)), codes_per_call=10)
    torch.testing.assert_close(sweep, expected.sweep(codes), rtol=1e-5, atol=1e-5)
    state = RandomState(codes.device)
    for ours, code in zip(objective.everywhere(codes[0], BATCH), codes[0], strict=True):
        theirs = state.again(lambda code: _by_hand(decoder, loss, code), code.expand(1, BATCH, *code.shape))
        torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)
    decoder.eval()
    assert objective.at(codes).full_sweep_is_free(1) == (spec == "1x12")


@pytest.mark.parametrize("spec", ["3x4", "1x12"])
@pytest.mark.parametrize("begins_linear", [True, False])
def test_batch_norm_in_training_mode_is_refused_in_a_sweep(begins_linear: bool, spec: str) -> None:
    _, codes, x = _problem("linear", spec)
    decoder = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, PIXELS))
    decoder = decoder if begins_linear else nn.Sequential(nn.Flatten(), nn.Identity(), decoder)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    at = objective.at(codes)
    counted = decoder.state_dict().copy()
    with pytest.raises(dgrad.InputError, match="BatchNorm in training mode inside a sweep"):
        at.sweep()
    with pytest.raises(dgrad.InputError, match="BatchNorm in training mode inside a sweep"):
        objective.everywhere(codes[0], BATCH)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, counted[name]), "no imagined code was counted"
    decoder.eval()
    assert objective.sweep(codes).isfinite().all()


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too() -> None:
    _, codes, x = _problem("linear")
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    decoder = nn.Sequential(nn.Linear(12, 8), norm, nn.Linear(8, PIXELS)).eval()
    with pytest.raises(dgrad.InputError, match="BatchNorm in training mode inside a sweep"):
        dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x)).sweep(codes)


def test_an_objective_stays_as_it_is() -> None:
    objective = dgrad.objective(decoder=nn.Linear(12, PIXELS), loss=dgrad.bernoulli(torch.ones(BATCH, PIXELS)))
    assert dgrad.objective(objective) is objective


def test_weights_that_change_after_a_call_are_seen_by_the_next() -> None:
    """One objective for a fixed batch and many steps: nothing of the weights is kept."""
    decoder, codes, x = _problem("linear")
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    before = objective(codes)
    with torch.no_grad():
        decoder.weight.data.mul_(2.0)
    after = objective(codes)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, _by_hand(decoder, dgrad.bernoulli(x), codes))


@pytest.mark.parametrize("name", ["bernoulli", "squared error"])
@pytest.mark.parametrize("low", [-0.1, 1.1])
def test_data_out_of_range_are_refused(name: str, low: float) -> None:
    with pytest.raises(dgrad.InputError, match=r"expected numbers in \[0, 1\]: divide bytes by 255"):
        LOSSES[name](torch.full((2, 3), low))


def test_outputs_that_do_not_fit_the_data_are_refused() -> None:
    decoder, codes, x = _problem("linear")
    with pytest.raises(dgrad.InputError, match="the decoder gives 6 outputs for each of 5 examples, and the data are"):
        dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x[:, 1:]))(codes)
    with pytest.raises(dgrad.InputError, match="the data are 4 examples of 6 numbers"):
        dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x[1:])).at(codes)
    with pytest.raises(dgrad.InputError, match=r"the loss returned shape \[2, 5, 6\] for outputs"):
        dgrad.objective(decoder=decoder, loss=lambda outputs: outputs - x)(codes)
    with pytest.raises(dgrad.InputError, match="data of 1 examples for logits of 5; expected as many of both"):
        dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x[:1])).everywhere(codes[:, 0], BATCH)


def test_no_compiler_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "_there_is_a_compiler", lambda: False)
    decoder, codes, x = _problem("linear")
    monkeypatch.setattr(reconstruction.cpu, "serves", lambda *_: pytest.fail("asked for the kernels"))
    dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x)).sweep(codes)


def test_nobody_looks_for_a_compiler_while_torch_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace the look."""
    monkeypatch.setattr(reconstruction, "_there_is_a_compiler", lambda: pytest.fail("looked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    decoder, codes, x = _problem("linear")
    loss = dgrad.bernoulli(x)
    objective = dgrad.objective(decoder=decoder, loss=loss)
    torch.testing.assert_close(objective(codes), _by_hand(decoder, loss, codes))


@pytest.mark.parametrize("name", ["linear", "hidden"])
def test_sweeps_are_transformed_by_torch_func(name: str) -> None:
    decoder, codes, x = _problem(name)
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    both = torch.stack([codes, codes.roll(1, -1)])
    swept = torch.func.vmap(lambda codes: objective.at(codes).sweep())(both)
    expected = torch.stack([objective.at(codes).sweep() for codes in both])
    torch.testing.assert_close(swept, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(dgrad.estimators()))
def test_one_example_with_the_data_of_five_is_refused_in_one_line(name: str) -> None:
    """A single example would broadcast: to a wrong gradient, or to an error of torch."""
    layer = dgrad.latent("3x2")
    estimator, logits, x = with_layer(name, layer), torch.zeros(1, 3, 2), torch.ones(5, 4)
    decoder = nn.Linear(6, 4)
    of_data = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    of_kl = dgrad.KLObjective(layer, torch.zeros(5, 3, 2))
    for objective in (of_data, of_kl, of_data + of_kl, 0.5 * of_data):
        with pytest.raises(dgrad.InputError, match=r"^data of 5 examples for logits of 1; expected as many of both$"):
            estimator(layer, logits, objective)


@pytest.mark.parametrize("name", ["exact", "leg", "direct-rb", "gumbel-softmax"])
@pytest.mark.parametrize("credit", ["site", "future"])
def test_a_decoder_with_a_loss_for_each_site(name: str, credit: str) -> None:
    """The same numbers as from a function of codes."""
    layer, mask = dgrad.latent("2x3"), torch.tensor([[True, True], [True, False]])
    if name == "exact" and credit == "future":
        layer = dgrad.latent("1x3")
    n, k = layer.shape
    decoder, x = nn.Linear(n * k, 4).double(), torch.rand(2, 2, 4, dtype=torch.float64)
    logits = torch.randn(2, 2, n, k, dtype=torch.float64, generator=Generator().manual_seed(0)).requires_grad_()

    def by_hand(codes: Tensor) -> Tensor:
        return (decoder(codes.flatten(-2)) - x).square().sum(-1)

    results = []
    for objective in (dgrad.objective(decoder=decoder, loss=lambda outputs: (outputs - x).square().sum(-1)), by_hand):
        generator = Generator().manual_seed(0)
        loss = dgrad.estimator(name)(layer, logits, objective, mask=mask, credit=credit, generator=generator).loss
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (logits, *decoder.parameters()))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_known_losses_of_examples_are_refused_where_sites_have_theirs() -> None:
    objective = dgrad.objective(decoder=nn.Linear(3, 4), loss=dgrad.bernoulli(torch.ones(2, 5, 4)))
    with pytest.raises(dgrad.InputError, match=r"dgrad.bernoulli has one loss for each example, and credit='site'"):
        dgrad.estimator("rloo")(dgrad.latent("1x3"), torch.zeros(2, 5, 1, 3), objective, credit="site")


@pytest.mark.parametrize("name", ["exact", "leg", "gumbel-softmax"])
def test_a_decoder_that_begins_with_an_embedding(name: str) -> None:
    """The same numbers as from a product with the embedding's weight, relaxed codes included."""
    layer, x = dgrad.latent("2x3"), torch.rand(4, 5)
    embedding, rest = nn.Embedding(3, 6), nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(12, 5))
    logits = torch.randn(4, 2, 3, generator=Generator().manual_seed(0)).requires_grad_()

    def by_hand(codes: Tensor) -> Tensor:
        outputs = rest((codes @ embedding.weight).flatten(0, 1))
        return dgrad.bernoulli(x)(outputs.unflatten(0, codes.shape[:2]))

    results = []
    for objective in (dgrad.objective(decoder=nn.Sequential(embedding, rest), loss=dgrad.bernoulli(x)), by_hand):
        loss = dgrad.estimator(name)(layer, logits, objective, generator=Generator().manual_seed(0)).loss
        results.append((loss, *torch.autograd.grad(loss.sum(), (logits, embedding.weight, rest[2].weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_an_embedding_cannot_look_up_is_refused_in_a_line() -> None:
    logits, loss = torch.zeros(4, 2, 3), dgrad.bernoulli(torch.ones(4, 10))
    for decoder, message in (
        (nn.Embedding(4, 5), r"^the decoder begins with an embedding of 4 values, .* or nn.Embedding\(3, ...\)$"),
        (nn.Embedding(3, 5, padding_idx=0), r"^the decoder looks up indices, .*, indices=True\)$"),
    ):
        with pytest.raises(dgrad.InputError, match=message):
            dgrad.estimator("direct")(
                dgrad.latent("2x3"), logits, dgrad.objective(decoder=nn.Sequential(decoder, nn.Flatten()), loss=loss)
            )


def test_a_decoder_that_begins_with_dropout_gets_flat_codes() -> None:
    decoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5)).eval()
    codes = torch.eye(3)[torch.tensor([[[0, 2], [1, 1]]])]
    loss = dgrad.bernoulli(torch.ones(2, 5))
    ours = dgrad.objective(decoder=decoder, loss=loss).at(codes)
    plain = dgrad.objective(decoder=decoder[1], loss=loss, compiled=False).at(codes)
    torch.testing.assert_close(ours.loss, plain.loss)
    torch.testing.assert_close(ours.sweep(), plain.sweep())
