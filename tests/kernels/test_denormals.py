"""Denormal numbers are zeros in a training step, in all threads, and only there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dgrad.config import TrainConfig
from dgrad.errors import CompilerWarning
from dgrad.kernels import cpu
from dgrad.kernels.denormals import flush_denormals, flushed
from dgrad.training.trainer import Trainer

CPU = torch.device("cpu")
DENORMAL = 1e-40


def share_of_zeros(numbers: Tensor) -> float:
    """Whatever this thread takes them for."""
    return float((numbers.view(torch.int32) == 0).float().mean())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_denormals_are_flushed_inside_alone() -> None:
    denormal = torch.full((16,), DENORMAL)
    assert not flushed()
    with flush_denormals(CPU):
        assert flushed()
        inside = denormal * 0.5
        with flush_denormals(CPU):
            pass
        assert flushed()
    assert not flushed()
    assert share_of_zeros(inside) == 1
    assert share_of_zeros(denormal * 0.5) == 0


def test_an_error_inside_leaves_nothing_flushed() -> None:
    with pytest.raises(ValueError, match="inside"), flush_denormals(CPU):
        raise ValueError("inside")
    assert not flushed()


def test_other_devices_change_nothing() -> None:
    with flush_denormals(torch.device("meta")):
        assert not flushed()


@pytest.mark.usefixtures("two_threads")
def test_the_compiled_library_reaches_the_threads_that_exist() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompilerWarning)
        if not cpu.available():
            pytest.skip("there is no C++ compiler here")
    denormal = torch.full((2**20,), DENORMAL)
    assert share_of_zeros(denormal * 0.5) == 0  # by two threads, which exist from now on
    with flush_denormals(CPU, compiled=True):
        inside = denormal * 0.5
    assert share_of_zeros(inside) == 1
    assert share_of_zeros(denormal * 0.5) == 0


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_training_step_flushes_denormals(compiled: str) -> None:
    trainer = Trainer(TrainConfig(estimator="gumbel-softmax", latent="2x3", compile=compiled, steps=1, device="cpu"))
    seen: list[bool] = []
    trainer.model.encoder.register_forward_hook(lambda *_: seen.append(flushed()))
    next(trainer.model.parameters()).register_hook(lambda gradient: seen.append(flushed()))
    trainer.train_step()
    assert seen == [True, True]
    assert not flushed()
