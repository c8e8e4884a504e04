"""The compiled sweep: right for any weights and logits, found in the cache, done without where there is no compiler."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad.config import TrainConfig
from dgrad.errors import CompilerWarning
from dgrad.kernels import cpu
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep
from dgrad.kernels.numerics import kl_to_uniform, log_softmax, one_hot_argmax, softmax, softplus
from dgrad.training.step import STEPS_WORTH_COMPILING
from dgrad.training.trainer import Trainer
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.reconstruction import DecoderEvaluation
from dgrad_plugins.models._dense import linear_vae, mlp_vae


@pytest.fixture
def compiler() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompilerWarning)
        if not cpu.available():
            pytest.skip("there is no C++ compiler here")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not looked for the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._library.cache_clear()
    yield tmp_path
    cpu._library.cache_clear()


def problem(
    n: int, k: int, pixels: int, examples: int, scale: float, shift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, D]`, rows `[n, k, D]` and the values `[N, n]` that they come from."""
    generator = torch.Generator().manual_seed(n + k + pixels)
    rows = scale * torch.randn(n, k, pixels, generator=generator)
    own = torch.randint(k, (examples, n), generator=generator)
    logits = torch.einsum("enk,nkd->ed", F.one_hot(own, k).float(), rows)
    return logits + shift * torch.randn(logits.shape, generator=generator), rows, own


def enumerated(logits: Tensor, rows: Tensor, own: Tensor) -> Tensor:
    """The change in float64, code by code."""
    logits, rows = logits.double(), rows.double()
    base = F.softplus(logits)
    result = torch.zeros(len(logits), *rows.shape[:2], dtype=torch.float64)
    for row, values in enumerate(rows):
        for value in range(len(values)):
            result[:, row, value] = (F.softplus(logits + values[value] - values[own[:, row]]) - base).sum(-1)
    return result


def compiled_change(logits: Tensor, rows: Tensor, own: Tensor) -> Tensor | None:
    """The kernel's sweep of black images `[N, n, k]`, less the loss: the change of the softplus part."""
    n, k, pixels = rows.shape
    images, loss = torch.zeros(len(logits), pixels), torch.zeros(1, len(logits))
    kernel = cpu.BernoulliLinear(rows.flatten(0, 1).T, None, images, (n, k))
    table = kernel.sweep_from(F.one_hot(own, k).float()[None], logits[None], loss)
    return None if table is None else table[0]


@pytest.mark.parametrize(
    ("n", "k", "pixels", "examples"),
    [
        *[(20, 10, 784, 3), (20, 2, 784, 5), (1, 40, 784, 5), (3, 3, 37, 1), (2, 4, 1, 7), (2, 5, 200, 4)],
        *[(2, 6, 64, 2), (1, 7, 784, 2), (1, 9, 130, 3), (4, 8, 17, 3), (1, 17, 300, 2)],
    ],
)  # fmt: skip
@pytest.mark.parametrize(("scale", "shift"), [(0.3, 1.0), (1.0, 3.0), (5.0, 1e4)], ids=["usual", "large", "extreme"])
def test_the_compiled_change_is_that_of_enumeration(
    compiler: None, n: int, k: int, pixels: int, examples: int, scale: float, shift: float
) -> None:
    logits, rows, own = problem(n, k, pixels, examples, scale, shift)
    change = compiled_change(logits, rows, own)
    assert change is not None
    truth = enumerated(logits, rows, own)
    # 1e-4 nats, and what float32 itself loses in sums of thousands of nats
    assert (change - truth).abs().max() < 1e-4 + 2e-7 * truth.abs().max()
    assert (change.gather(-1, own.unsqueeze(-1)) == 0).all()


def test_the_number_of_threads_changes_nothing(compiler: None) -> None:
    logits, rows, own = problem(4, 10, 100, 7, 0.5)
    before = torch.get_num_threads()
    try:
        changes = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            changes.append(compiled_change(logits, rows, own))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(change, changes[0]) for change in changes)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("scale", [0.5, 40.0], ids=["usual", "too large for products"])
def test_the_sweep_is_right_with_and_without_the_kernel(compiler: None, k: int, scale: float) -> None:
    logits, rows, own = problem(3, k, 50, 8, scale)
    assert (compiled_change(logits, rows, own) is None) == (scale == 40.0)
    codes = F.one_hot(own, k).float().unflatten(0, (2, 4))  # [S, B, n, k]
    images = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    weight, outputs = rows.flatten(0, 1).T.contiguous(), logits.unflatten(0, (2, 4))
    loss = (F.softplus(outputs) - images * outputs).sum(-1)
    off, on = (bernoulli_linear_sweep(codes, weight, outputs, images, loss, compiled=way) for way in (False, True))
    torch.testing.assert_close(on, off, rtol=1e-5, atol=1e-4)


def by_torch(weight: Tensor, bias: Tensor, codes: Tensor, images: Tensor) -> Tensor:
    outputs = codes.flatten(2) @ weight.T + bias
    return F.softplus(outputs).sum(-1) - (images * outputs).sum(-1)


@pytest.mark.parametrize(("n", "k", "pixels"), [(4, 3, 37), (20, 10, 784), (1, 40, 64), (3, 2, 3000)])
@pytest.mark.parametrize("scale", [0.3, 20.0], ids=["usual", "large"])
def test_the_compiled_loss_and_its_gradient_are_torchs(
    compiler: None, n: int, k: int, pixels: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(n * k)
    weight = (scale * torch.randn(pixels, n * k, generator=generator)).requires_grad_()
    bias = (scale * torch.randn(pixels, generator=generator)).requires_grad_()
    images = torch.rand(5, pixels, generator=generator)
    images[images < 0.5] = 0
    codes = F.one_hot(torch.randint(k, (2, 5, n), generator=generator), k).float()
    kernel = cpu.BernoulliLinear(weight, bias, images, (n, k))
    at = kernel.at(codes)
    assert at is not None
    loss = at.loss
    truth = by_torch(*(tensor.double() for tensor in (weight, bias, codes, images)))
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-4)
    share = torch.randn(2, 5, generator=generator)
    gradients = torch.autograd.grad((loss * share).sum(), (weight, bias))
    truths = torch.autograd.grad((truth * share).sum(), (weight, bias))
    for gradient, true in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-5)

    table = at.sweep()
    if scale == 0.3:
        assert table is not None
        wide = [tensor.detach().double() for tensor in (weight, bias, codes, images)]
        outputs = wide[2].flatten(2) @ wide[0].T + wide[1]
        swept = bernoulli_linear_sweep(wide[2], wide[0], outputs, wide[3], truth.detach())
        assert (table - swept).abs().max() < 1e-4 + 5e-7 * swept.abs().max()
        assert torch.equal(table[codes == 1], loss.detach().unsqueeze(-1).expand(2, 5, n).flatten())


def test_what_the_kernel_does_not_serve_goes_through_torch(compiler: None) -> None:
    model = linear_vae(dgrad.latent("3x4"), (1, 5, 5), likelihood("bernoulli"))
    images = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = model.reconstruction(images)
    model.compiled_kernels = True
    objective = model.reconstruction(images)
    hard = F.one_hot(torch.tensor([[[0, 1, 2], [3, 3, 0]]]), 4).float()
    for each, compiled in ((objective, True), (plain, False)):
        at = each.at(hard)
        assert isinstance(at, DecoderEvaluation)
        assert (at.kernel is not None) == compiled
    cases = {
        "hard": hard,
        "soft": torch.full((1, 2, 3, 4), 0.25),
        "no value": hard * 0,
        "two values": hard.roll(1, -1) + hard,
        "one code for all images": hard[:, :1],
        "codes with a gradient": hard.requires_grad_(),
    }
    for name, codes in cases.items():
        torch.testing.assert_close(objective(codes), plain(codes), msg=name)
    (slope,) = torch.autograd.grad(objective(hard).sum(), hard)
    (expected,) = torch.autograd.grad(plain(hard).sum(), hard)
    torch.testing.assert_close(slope, expected)
    codes = hard.detach()
    torch.testing.assert_close(objective.sweep(codes), plain.sweep(codes))
    at = objective.at(codes)
    objective(codes.roll(1, -1))  # what the kernel sees in between changes nothing
    torch.testing.assert_close(at.sweep(), plain.at(codes).sweep())
    with torch.no_grad():
        model.decoder.first.weight *= 1e4  # type: ignore[operator, union-attr]
    large = model.reconstruction(images)
    torch.testing.assert_close(large.at(codes).sweep(), plain.at(codes).sweep(), rtol=1e-5, atol=1e-2)


def test_a_loss_that_is_not_a_number_stays_one(compiler: None) -> None:
    weight, bias = torch.zeros(20, 6), torch.zeros(20)
    codes = F.one_hot(torch.tensor([[[0, 1]]]), 3).float()
    for place, value in ((weight, torch.nan), (bias, torch.inf), (bias, torch.nan)):
        broken = place.clone()
        broken.view(-1)[0] = value
        arguments = (broken, bias) if place is weight else (weight, broken)
        at = cpu.BernoulliLinear(*arguments, torch.zeros(1, 20), (2, 3)).at(codes)
        assert at is not None
        assert not at.loss.isfinite().any()


def test_weights_that_are_not_numbers_are_left_to_torch(compiler: None) -> None:
    logits, rows, own = problem(2, 3, 20, 2, 1.0)
    rows[0, 0, 0] = torch.nan
    assert compiled_change(logits, rows, own) is None


@pytest.mark.slow
def test_the_kernel_is_compiled_once(compiler: None, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.available()
    (library,) = (fresh / "dgrad" / "kernels").iterdir()
    assert library.suffix == ".so"
    cpu._library.cache_clear()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert cpu.available()


@pytest.mark.parametrize(
    ("command", "reason"), [("no-such-compiler", "No such file"), (f"{sys.executable} -c 1/0", "Traceback")]
)
def test_without_a_compiler_one_warning_and_torch_alone(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.warns(CompilerWarning, match=f"(?s)could not be compiled.*{reason}.*--compile off") as caught:
        assert not cpu.available()
        assert not cpu.available()
    assert len(caught) == 1
    logits, rows, own = problem(2, 3, 20, 4, 0.5)
    codes, weight = F.one_hot(own, 3).float()[None], rows.flatten(0, 1).T
    images, loss = torch.zeros(4, 20), F.softplus(logits).sum(-1)[None]
    sweep = bernoulli_linear_sweep(codes, weight, logits[None], images, loss, compiled=True)
    torch.testing.assert_close(
        (sweep - loss[..., None, None])[0].double(), enumerated(logits, rows, own), atol=1e-4, rtol=0
    )
    assert not list((fresh / "dgrad").rglob("*.so"))


def test_without_a_place_for_the_library_torch_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    with pytest.warns(CompilerWarning, match="Not a directory"):
        assert not cpu.available()


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_says_in_one_line_that_there_is_no_compiler(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dgrad_cli",
        "train",
        "--estimator",
        "leg",
        "--latent",
        "2x2",
        "--steps",
        "2",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--compile", "on", "--out", str(tmp_path / "run")],
        env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "collapsed" not in line]  # after two steps the code is
    assert len(lines) == 1
    assert lines[0].startswith("warning: the fast sweep could not be compiled with 'no-such-compiler'")


@pytest.mark.parametrize(
    ("mode", "steps", "compiled"),
    [
        *[("auto", STEPS_WORTH_COMPILING - 1, False), ("auto", STEPS_WORTH_COMPILING, True)],
        *[("on", 1, True), ("off", 10**6, False)],
    ],
)  # fmt: skip
def test_auto_compiles_for_long_runs_alone(mode: str, steps: int, compiled: bool) -> None:
    trainer = Trainer(TrainConfig(estimator="leg", latent="2x2", compile=mode, steps=steps))
    assert trainer.model.compiled_kernels == compiled


def test_training_with_the_kernel_is_training_without(compiler: None) -> None:
    on, off = (
        Trainer(TrainConfig(estimator="direct-rb", latent="4x5", compile=mode, steps=5, device="cpu"))
        for mode in ("on", "off")
    )
    for _ in range(5):
        on.train_step()
        off.train_step()
    for ours, theirs in zip(on.model.parameters(), off.model.parameters(), strict=True):
        # Adam divides by the gradient's size: where that is near 0, a rounding error is a difference in the step
        assert ((ours - theirs).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("k", [2, 3, 10, 15, 16])
@pytest.mark.parametrize(("ours", "torchs"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)])
def test_softmaxes_are_those_of_torch(k: int, ours: object, torchs: object) -> None:
    assert callable(ours) and callable(torchs)
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(2, 5, k, 3, generator=generator, dtype=torch.float64).transpose(-1, -2).requires_grad_()
    x.data[0, 0, 0] *= 1e4
    weights = torch.randn(2, 5, 3, k, generator=generator, dtype=torch.float64)
    mine, theirs = ours(x), torchs(x, -1)
    torch.testing.assert_close(mine, theirs)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def kl_by_torch(x: Tensor) -> Tensor:
    log_p = x.log_softmax(-1)
    return (log_p.exp() * (log_p + math.log(x.shape[-1]))).sum((-2, -1))


OF_ROWS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (softmax, lambda x: x.softmax(-1)),
    (log_softmax, lambda x: x.log_softmax(-1)),
    (kl_to_uniform, kl_by_torch),
]
"""Functions of rows that have a compiled form, and the same by torch."""


@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize(("ours", "torchs"), OF_ROWS, ids=["softmax", "log_softmax", "kl"])
def test_compiled_functions_of_rows_are_torchs_in_float64(
    compiler: None, k: int, ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(k)
    x = 3 * torch.randn(3, k, 7, generator=generator).mT  # 21 rows, which fill no whole number of vectors
    x[0, 0, 0], x[1, 0, 1], x[2, 0, 0] = 200.0, -200.0, -1e30
    x.requires_grad_()
    with cpu.compiled_rows():
        assert cpu.serves_rows(x)
        mine = ours(x)
    theirs = torchs(x.double())
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=2e-6)
    weights = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    got, expected = (torch.autograd.grad((y * weights).sum(), x, create_graph=True)[0] for y in (mine, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # as for a second derivative
    (plain,) = torch.autograd.grad((mine * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    second, true = (torch.autograd.grad(slope.sin().sum(), x)[0] for slope in (got, expected))
    torch.testing.assert_close(second, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [3, 16])
def test_the_compiled_argmax_is_torchs(compiler: None, k: int) -> None:
    x = torch.randint(3, (40, k), generator=torch.Generator().manual_seed(k)).float()  # with many equals
    x[3], x[4, 1] = -torch.inf, torch.nan
    x[5, 0] = torch.nan
    with cpu.compiled_rows():
        mine = one_hot_argmax(x)
    assert torch.equal(mine, one_hot_argmax(x))
    assert torch.equal(mine.argmax(-1), x.argmax(-1))


def test_forbidden_values_have_no_probability_and_no_kl(compiler: None) -> None:
    x = torch.tensor([[[1.0, -torch.inf, 0.5], [-torch.inf, 0.0, -torch.inf]]], requires_grad=True)
    with cpu.compiled_rows():
        assert (softmax(x)[x == -torch.inf] == 0).all()
        (slope,) = torch.autograd.grad(kl_to_uniform(x).sum(), x)
    kept = torch.tensor([[[1.0, 0.5]]])
    expected = kl_by_torch(kept) + math.log(3 / 2) + math.log(3)
    torch.testing.assert_close(kl_to_uniform(x), expected)
    with cpu.compiled_rows():
        torch.testing.assert_close(kl_to_uniform(x), expected)
    assert (slope[x == -torch.inf] == 0).all()


def test_rows_are_compiled_where_that_was_asked_for_alone(compiler: None) -> None:
    x = torch.zeros(2, 3)
    assert not cpu.serves_rows(x)
    with cpu.compiled_rows():
        assert cpu.serves_rows(x)
        assert not cpu.serves_rows(x.double())
        assert not cpu.serves_rows(torch.zeros(2, cpu.LONGEST_ROW + 1))
        seen: list[bool] = []
        torch.func.vmap(lambda row: seen.append(cpu.serves_rows(row)) or row)(x)  # type: ignore[func-returns-value]
        assert seen == [False]
        with cpu.compiled_rows(False):
            assert not cpu.serves_rows(x)
    assert not cpu.serves_rows(x)


@pytest.mark.parametrize(
    ("ours", "name"),
    [(cpu.bernoulli_loss, "bernoulli"), (cpu.squared_error, "squared-error")],
    ids=["bernoulli", "squared-error"],
)
def test_the_compiled_losses_have_torchs_derivatives(
    compiler: None, ours: Callable[[Tensor, Tensor], Tensor], name: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 37, 3, generator=generator, requires_grad=True).mT  # not contiguous
    images = torch.rand(3, 37, generator=generator)
    weights = torch.randn(2, 3, generator=generator)
    mine, theirs = ours(outputs, images), likelihood(name).loss(outputs.double(), images.double())
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
    (plain,) = torch.autograd.grad((mine * weights).sum(), outputs, retain_graph=True)
    got, expected = (
        torch.autograd.grad((loss * weights).sum(), outputs, create_graph=True)[0] for loss in (mine, theirs)
    )
    for slope in (plain, got):
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)
    second, true = (torch.autograd.grad(slope.square().sum(), outputs)[0] for slope in (got, expected))
    torch.testing.assert_close(second, true, rtol=1e-4, atol=1e-5)


def test_weights_are_packed_when_hard_codes_come(compiler: None) -> None:
    kernel = cpu.BernoulliLinear(torch.zeros(5, 6), torch.zeros(5), torch.zeros(2, 5), (2, 3))
    assert kernel.at(torch.full((1, 2, 2, 3), 1 / 3)) is None
    assert "packed" not in vars(kernel)
    assert kernel.at(F.one_hot(torch.zeros(1, 2, 2, dtype=torch.int64), 3).float()) is not None
    assert "packed" in vars(kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38])]).to(dtype)
    x.requires_grad_()
    expected = torch.logaddexp(
        x.detach().double(), torch.zeros((), dtype=torch.float64)
    )  # torch's own softplus stops at 20
    torch.testing.assert_close(
        softplus(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )
    (slope,) = torch.autograd.grad(softplus(x).sum(), x)
    torch.testing.assert_close(slope, x.sigmoid())
    assert softplus(torch.tensor(float("nan"))).isnan()
    assert softplus(torch.tensor(float("inf"))) == float("inf")


def test_softplus_can_be_differentiated_twice() -> None:
    """As estimators with a learned control variate do."""
    x = torch.tensor([-3.0, 0.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softplus, x)
    assert torch.autograd.gradgradcheck(softplus, x)


@pytest.mark.parametrize("pixels", [1, 16, 37, 784, 1100])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_the_compiled_loss_of_logits_is_that_in_float64(compiler: None, pixels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(pixels)
    logits = scale * torch.randn(3, 5, pixels, generator=generator)
    images = torch.rand(5, pixels, generator=generator)
    expected = (F.softplus(logits.double()) - images.double() * logits.double()).sum(-1)
    # each sum's own rounding, in units of the largest number in it
    allowed = 1e-4 + 4e-7 * logits.abs().sum(-1).double()
    assert ((cpu.bernoulli_loss(logits, images) - expected).abs() <= allowed).all()
    assert ((cpu.bernoulli_loss(logits.mT.contiguous().mT, images) - expected).abs() <= allowed).all()
    logits[1, 2, pixels // 2] = float("nan")
    assert cpu.bernoulli_loss(logits, images).isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("pixels", [1, 16, 37, 784, 1100])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_the_compiled_squared_error_is_that_in_float64(compiler: None, pixels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(pixels)
    outputs = scale * torch.randn(3, 5, pixels, generator=generator)
    outputs[0, 0, 0] = float("inf")
    outputs[0, 1, 0] = -float("inf")
    images = torch.rand(5, pixels, generator=generator)
    expected = likelihood("squared-error").loss(outputs.double(), images.double())
    torch.testing.assert_close(cpu.squared_error(outputs, images).double(), expected, rtol=1e-6, atol=1e-6)
    apart = outputs.mT.contiguous().mT
    torch.testing.assert_close(cpu.squared_error(apart, images).double(), expected, rtol=1e-6, atol=1e-6)
    outputs[1, 2, pixels // 2] = float("nan")
    assert cpu.squared_error(outputs, images).isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("of_pixels", ["bernoulli", "squared-error"])
@pytest.mark.parametrize("spec", ["3x4", "5x2"])
def test_the_sweep_of_a_deep_decoder_is_right_with_and_without_the_kernel(
    compiler: None, spec: str, of_pixels: str
) -> None:
    layer, generator = dgrad.latent(spec), torch.Generator().manual_seed(1)
    model = mlp_vae(layer, (1, 5, 7), likelihood(of_pixels), (16,))
    images = torch.rand(6, 1, 5, 7, generator=generator).round()
    codes = layer.sample(torch.zeros(6, *layer.shape), 2, generator=generator)
    tables = []
    for compiled in (False, True):
        model.compiled_kernels = compiled
        tables.append(model.reconstruction(images).sweep(codes))
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-5)
    exact = mlp_vae(layer, (1, 5, 7), likelihood(of_pixels), (16,)).double()
    exact.load_state_dict(model.state_dict())
    expected = exact.reconstruction(images.double()).sweep(codes.double())
    torch.testing.assert_close(tables[1].double(), expected, rtol=0, atol=1e-4)
