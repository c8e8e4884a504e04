"""The table of docs/guides/engineering-edges.md: every cell is run and compared with what the page says.

A cell is `yes`, or the letter of an error that the page lists with its message.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from helpers import with_layer
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

import dgrad
from dgrad.core.estimates import Estimate
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad_plugins.estimators import ESTIMATORS

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "engineering-edges.md").read_text(encoding="utf-8")
LAYER = dgrad.latent("3x2")
BATCH = 16
LOGITS = torch.randn(BATCH, 3, 2, generator=Generator().manual_seed(0))
WEIGHT = torch.randn(6, 5, generator=Generator().manual_seed(1))
AVERAGING = ("aimle", "double-cv", "reinforce", "relax", "rodeo")
"""The estimators that keep averages of earlier steps."""


def _loss(codes: Tensor) -> Tensor:
    return (codes.flatten(2) @ WEIGHT - 1).square().sum(-1)


def _call(
    estimator: GradientEstimator, logits: Tensor = LOGITS, loss: CodeLoss = _loss, seed: int = 0
) -> tuple[Estimate, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    estimate = estimator(LAYER, leaf, loss, generator=Generator().manual_seed(seed))
    return estimate, torch.autograd.grad(estimate.loss.sum(), leaf)[0]


def _state(estimator: GradientEstimator) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in estimator.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# One function for each column. It passes where the cell says yes.


def inference_mode(name: str) -> None:
    """The loss and the codes are right inside, nothing is learned there, and training goes on as if it had not been."""
    estimator, expected = with_layer(name, LAYER), with_layer(name, LAYER)
    with torch.inference_mode():
        made = dgrad.estimator(name)
        quiet = estimator(LAYER, LOGITS, _loss, generator=Generator().manual_seed(1))
    torch.random.manual_seed(0)
    made.set_layer(LAYER)
    loud, _ = _call(copy.deepcopy(expected), seed=1)
    torch.testing.assert_close(quiet.loss.clone(), loud.loss.detach())
    assert torch.equal(quiet.codes, loud.codes)
    for step in range(2):
        gradient = _call(expected, seed=step)[1]
        assert gradient.any()
        torch.testing.assert_close(_call(estimator, seed=step)[1], gradient)
        torch.testing.assert_close(_call(made, seed=step)[1], gradient)
    assert _same(_state(estimator), _state(expected))


def eval_mode(name: str) -> None:
    """Averages stand still in `.eval()`, and move again in `.train()`."""
    estimator = with_layer(name, LAYER).eval()
    before = _state(estimator)
    for seed in range(2):
        assert _call(estimator, seed=seed)[1].any()
    assert _same(before, _state(estimator))
    _call(estimator.train())
    assert _same(before, _state(estimator)) == (name not in AVERAGING)


def checkpointed(name: str) -> None:
    """A checkpoint draws the same codes again: the same gradient for the encoder, and averages move once."""
    _checkpointed(with_layer(name, LAYER))


def _checkpointed(estimator: GradientEstimator) -> None:
    encoder = torch.nn.Linear(5, 6)
    images = torch.randn(BATCH, 5)

    def whole(estimator: GradientEstimator, images: Tensor) -> Tensor:
        return estimator(LAYER, encoder(images).view(BATCH, 3, 2), _loss).loss.sum()

    gradients = []
    estimators = [estimator, copy.deepcopy(estimator)]
    for each, run in zip(estimators, (whole, _checkpoint_of(whole)), strict=True):
        torch.random.manual_seed(0)
        gradients.append(torch.autograd.grad(run(each, images), encoder.weight)[0])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
    assert _same(*map(_state, estimators))


def _checkpoint_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: checkpoint(function, *arguments, use_reentrant=False)


def empty_batch(name: str) -> None:
    """A batch of no example gives an empty loss and an empty gradient, and averages stay finite."""
    estimator = with_layer(name, LAYER)
    before = _state(estimator)
    for dtype in (torch.float32, torch.bfloat16):
        estimate, gradient = _call(estimator, LOGITS[:0].to(dtype), lambda codes: _loss(codes.float()))
        assert estimate.loss.shape == (0,)
        assert estimate.codes.shape[1:] == gradient.shape == (0, 3, 2)
        assert gradient.dtype == dtype
    assert _same(before, _state(estimator))
    assert _call(estimator)[1].isfinite().all()


def integer_losses(name: str) -> None:
    """Losses of int64 and of bool work as the same numbers in float32."""
    for loss in (lambda codes: codes[..., 0].sum(-1).long(), lambda codes: codes[..., 0].sum(-1) > 1):
        estimate, gradient = _call(with_layer(name, LAYER), loss=loss)
        expected, truth = _call(with_layer(name, LAYER), loss=lambda codes, loss=loss: loss(codes).float())
        assert estimate.loss.dtype == torch.float32
        torch.testing.assert_close(estimate.loss, expected.loss)
        torch.testing.assert_close(gradient, truth)


def float64_losses(name: str) -> None:
    """A loss in float64 of logits in float32 has the gradient of one in float32, in float32."""
    weight = WEIGHT.double()

    def loss(codes: Tensor) -> Tensor:
        return (codes.flatten(2).double() @ weight - 1).square().sum(-1)

    _, gradient = _call(with_layer(name, LAYER), loss=loss)
    _, truth = _call(with_layer(name, LAYER))
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


def compiled(name: str) -> None:
    """`torch.compile(fullgraph=True)` captures the call, which gives the same gradient and the same averages."""
    _compiled(name, None)


def compiled_with_generator(name: str) -> None:
    """The same with a generator of the caller's."""
    _compiled(name, Generator())


def _compiled(name: str, generator: Generator | None) -> None:
    estimators = [with_layer(name, LAYER), with_layer(name, LAYER)]

    def whole(estimator: GradientEstimator, logits: Tensor) -> Tensor:
        return estimator(LAYER, logits, _loss, generator=generator).loss

    torch._dynamo.reset()
    runs = [whole, torch.compile(whole, fullgraph=True, backend="aot_eager")]
    gradients = []
    for estimator, run in zip(estimators, runs, strict=True):
        (torch.random if generator is None else generator).manual_seed(3)
        leaf = LOGITS.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(estimator, leaf).sum(), leaf)[0])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(_state(estimators[1]), _state(estimators[0]))


def func_grad(name: str) -> None:
    """`torch.func.grad` gives what autograd gives."""
    _func_grad(with_layer(name, LAYER))


def _func_grad(estimator: GradientEstimator) -> None:
    _, truth = _call(copy.deepcopy(estimator))

    def total(logits: Tensor) -> Tensor:
        return estimator(LAYER, logits, _loss, generator=Generator().manual_seed(0)).loss.sum()

    torch.testing.assert_close(torch.func.grad(total)(LOGITS), truth)


def func_vmap(name: str) -> None:
    """`vmap` over examples of `grad` gives every example draws of its own, and the estimator's mean gradient.

    The difference of two means over 2,000 draws is held to 6 standard errors in 6 coordinates: one false alarm in 80
    million runs with a fresh seed. The seed is fixed.
    """
    estimator = with_layer(name, LAYER)
    many = LOGITS[:1].expand(2000, 3, 2)
    truth = _call(copy.deepcopy(estimator), many)[1]

    def one(logits: Tensor) -> Tensor:
        return estimator(LAYER, logits.unsqueeze(0), _loss).loss[0]

    torch.random.manual_seed(0)
    gradients = torch.func.vmap(torch.func.grad(one), randomness="different")(many)
    error = ((truth.var(0) + gradients.var(0)) / len(many)).sqrt()
    assert gradients.any()
    assert ((gradients.mean(0) - truth.mean(0)).abs() <= 6 * error + 1e-5).all()
    if truth.std(0).max() > 1e-5:
        assert gradients.std(0).max() > 1e-5


def twice(name: str) -> None:
    """The derivative of the gradient, from `create_graph=True`, is that of the gradient with the same noise."""
    estimator = with_layer(name, LAYER)
    weight = WEIGHT.double()

    def loss(codes: Tensor) -> Tensor:
        return (codes.flatten(2) @ weight - 1).square().sum(-1)

    def gradient(logits: Tensor) -> Tensor:
        loss = estimator(
            LAYER, logits, lambda codes: _loss(codes.float()).double(), generator=Generator().manual_seed(0)
        ).loss
        return torch.autograd.grad(loss.sum(), logits, create_graph=True)[0]

    logits = LOGITS.double().requires_grad_()
    along = torch.randn(BATCH, 3, 2, dtype=torch.float64, generator=Generator().manual_seed(1))
    product = torch.autograd.grad((gradient(logits) * along).sum(), logits)[0]
    h = 1e-3
    numeric = (gradient(logits + h * along) - gradient(logits - h * along)) / (2 * h)
    torch.testing.assert_close(product, numeric.detach(), rtol=1e-3, atol=1e-3)


def other_dtypes(name: str) -> None:
    """`.half()`, `.bfloat16()` and `.double()` of a module that holds it round no hyper-parameter and no average."""
    for change in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        estimator = with_layer(name, LAYER)
        _call(estimator)
        before = {key: buffer.clone() for key, buffer in estimator.named_buffers()}
        change(torch.nn.ModuleList([estimator]))
        for key, buffer in estimator.named_buffers():
            assert buffer.dtype == torch.float32, key
            assert torch.equal(buffer, before[key]), key
        assert _call(estimator)[1].isfinite().all()


def autocast(name: str) -> None:
    """The estimator computes in float32, its logits may be bfloat16, and the decoder runs in bfloat16."""

    def elementwise(codes: Tensor) -> Tensor:
        return (codes * WEIGHT[:, 0].view(3, 2)).flatten(2).sum(-1).exp()

    _, truth = _call(with_layer(name, LAYER), loss=elementwise)
    leaf = LOGITS.clone().requires_grad_()
    encoder, decoder = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2)
    seen = set()

    def decoded(codes: Tensor) -> Tensor:
        output = decoder(codes.flatten(2))
        seen.add(output.dtype)
        return output.square().sum(-1)

    with torch.autocast("cpu", torch.bfloat16):
        inside = with_layer(name, LAYER)(LAYER, leaf, elementwise, generator=Generator().manual_seed(0))
        logits = encoder(torch.ones(BATCH, 5)).view(BATCH, 3, 2)
        loss = with_layer(name, LAYER)(LAYER, logits, decoded).loss.mean()
    (gradient,) = torch.autograd.grad(inside.loss.sum(), leaf)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


EDGES: dict[str, Callable[[str], None]] = {
    "`inference_mode`": inference_mode,
    "`.eval()`": eval_mode,
    "`checkpoint`": checkpointed,
    "batch 0": empty_batch,
    "integer loss": integer_losses,
    "float64 loss": float64_losses,
    "`compile`": compiled,
    "`compile`, `generator=`": compiled_with_generator,
    "`func.grad`": func_grad,
    "`vmap`": func_vmap,
    "`create_graph`": twice,
    "`.half()`": other_dtypes,
    "`autocast`": autocast,
}
COMPILED = ("`compile`", "`compile`, `generator=`")
"""Run in a program of their own, all in one: `torch.compile` cannot trace the tests' checks of shapes."""
REFUSALS = (dgrad.InputError, torch._dynamo.exc.Unsupported)


def _table() -> dict[str, dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def _messages() -> dict[str, str]:
    """The message of each letter that a cell may have."""
    return dict(re.findall(r"^- \*\*(\w)\*\*: `([^`]+)`", PAGE, re.MULTILINE))


TABLE, MESSAGES = _table(), _messages()


def test_the_table_has_every_estimator_and_every_edge() -> None:
    assert list(TABLE) == list(ESTIMATORS)
    assert all(list(row) == [*EDGES, "Lightning", "Accelerate"] for row in TABLE.values())
    assert {cell for row in TABLE.values() for cell in row.values()} == {"yes", *MESSAGES}


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of shapes are the tests' own; a compiler and a transform cannot see through them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("name", "edge"),
    [
        pytest.param(name, edge, id=f"{name}-{EDGES[edge].__name__}")
        for name in ESTIMATORS
        for edge in EDGES
        if edge not in COMPILED
    ],
)
def test_every_cell_is_true(name: str, edge: str) -> None:
    cell = TABLE[name][edge]
    if cell == "yes":
        EDGES[edge](name)
        return
    with pytest.raises(REFUSALS, match=re.escape(MESSAGES[cell])):
        EDGES[edge](name)


@pytest.mark.slow
@pytest.mark.processes
def test_every_compiled_cell_is_true() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-W", "ignore", __file__]
    printed = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
    got = {(name, edge): outcome for name, edge, outcome in json.loads(printed.splitlines()[-1])}
    assert got.keys() == {(name, edge) for name in ESTIMATORS for edge in COMPILED}
    for (name, edge), outcome in got.items():
        assert MESSAGES.get(TABLE[name][edge], "yes") in outcome, f"{name}, {edge}: {outcome}"


def _outcome(name: str, edge: str) -> str:
    try:
        EDGES[edge](name)
    except REFUSALS as error:
        return str(error)
    return "yes"


# What the table has no room for


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("name", AVERAGING)
def test_with_averages_that_stand_still_a_checkpoint_and_transforms_work(name: str) -> None:
    """`relax` still differentiates a gradient, which no transform allows."""
    estimator = with_layer(name, LAYER).eval()
    _checkpointed(estimator)
    if name != "relax":
        _func_grad(estimator)


def test_a_checkpoint_refuses_a_generator_that_has_moved_on() -> None:
    generator, estimator = Generator(), dgrad.estimator("rloo")
    logits = LOGITS.clone().requires_grad_()
    loss = checkpoint(
        lambda logits: estimator(LAYER, logits, _loss, generator=generator).loss.sum(), logits, use_reentrant=False
    )
    with pytest.raises(dgrad.InputError, match="leave generator out"):
        loss.backward()


def test_a_draw_of_no_example_leaves_averages_alone() -> None:
    estimator = dgrad.estimator("reinforce")
    draw = estimator.draw(LAYER, LOGITS[:0])
    assert draw.estimate(_loss(draw.codes)).loss.shape == (0,)
    assert estimator.average == 0


def test_learned_networks_are_rounded_as_any_network_is() -> None:
    network: Any = with_layer("relax", LAYER).half().network
    assert network.hidden.weight.dtype == torch.float16


if __name__ == "__main__":
    print(json.dumps([(name, edge, _outcome(name, edge)) for name in ESTIMATORS for edge in COMPILED]))
