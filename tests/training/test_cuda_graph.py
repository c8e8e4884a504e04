"""Recorded steps. Everywhere it is tested that the step which is recorded trains as the ordinary step does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dgrad.config import TrainConfig, configure
from dgrad.training import cuda_graph
from dgrad.training.cuda_graph import CudaGraphError, CudaGraphSteps
from dgrad.training.step import Lockstep, TrainingStep
from dgrad.training.trainer import Trainer

SETTINGS = {
    "dataset": "digits",
    "latent": "4x3",
    "batch-size": "64",
    "lr": "cosine:0.01:0",
    "weight-decay": "0.01",
    "input-dropout": "0.1",
    "steps": "60",
    "device": "cpu",
}
CASES = {
    "a scheduled epsilon": {"estimator": "direct-rb", "set": {"epsilon": "geometric:1:0.02"}},
    "a learned control variate": {"estimator": "relax"},
    "a moving average": {"estimator": "reinforce"},
    "pixels drawn anew": {"estimator": "leg", "binarize": "dynamic"},
    "labels and a scheduled KL": {
        "estimator": "direct",
        "latent": "1x10",
        "labels": "40",
        "kl-weight": "geometric:10:1",
        "label-loss": "code",
        "augment": "true",
        "adversarial-weight": "0.5",
    },
    "the KL inside": {"estimator": "gumbel-softmax", "kl": "inside", "set": {"temperature": "linear:1:0.3"}},
    "a refined q": {"estimator": "direct-rb", "refine-steps": 2},
}


class Called:
    """In the place of a recorded step: it calls the step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


def keep_rates_on_the_device(step: TrainingStep) -> None:
    """As a recorded step does."""
    for group in step.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])


def ordinary_step(config: TrainConfig) -> tuple[TrainingStep, Lockstep]:
    """The step of a run, and what makes it."""
    step = Trainer(config).training_step
    return step, Lockstep([step])


def device_step(config: TrainConfig) -> tuple[TrainingStep, Lockstep]:
    """The same with the step that would be recorded, called instead of replayed."""
    step, lockstep = ordinary_step(config)
    keep_rates_on_the_device(step)
    lockstep.cuda_graph = Called(step.make_device_step())  # type: ignore[assignment]
    return step, lockstep


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_step_that_is_recorded_trains_as_the_ordinary_one(case: str) -> None:
    config = configure({**SETTINGS, **CASES[case]})
    (ordinary, alone), (device, called) = ordinary_step(config), device_step(config)
    short = len(ordinary.batches.order) % config.batch_size
    assert short, "the last batch of an epoch should be short, so that it takes the ordinary way"
    for step in range(60):  # over two ends of an epoch
        alone.advance()
        called.advance()
        # the rates of the ordinary one are float64, so that the last digits differ
        torch.testing.assert_close(device.loss_sum, ordinary.loss_sum, rtol=1e-4, atol=1e-4)
        assert device.device_step is not None
        assert device.device_step.step.item() == step + 1
    for name, tensor in device.loss.state_dict().items():
        torch.testing.assert_close(tensor, ordinary.loss.state_dict()[name], rtol=1e-3, atol=1e-3, msg=name)
    assert torch.equal(device.noise.get_state(), ordinary.noise.get_state())


def test_its_schedules_move() -> None:
    step, lockstep = device_step(configure({**SETTINGS, **CASES["a scheduled epsilon"]}))
    estimator = step.loss.estimator
    for number in range(10):
        lockstep.advance()
        assert estimator.epsilon.item() == pytest.approx(estimator.schedules["epsilon"](number))  # type: ignore[operator]
        assert step.optimizer.param_groups[1]["lr"].item() == pytest.approx(step.lr(number))


# What happens around the recording, with a stand-in for torch.cuda


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def __init__(self) -> None:
        self.generators: list[Generator] = []

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.append(generator)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda without a device: a step that is recorded is called, once."""

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "stream": nothing,
        "graph": nothing,
        "set_sync_debug_mode": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Counter:
    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.moments: list[Tensor] = []
        self.noise = Generator().manual_seed(0)

    def step(self) -> None:
        if not self.moments:
            self.moments.append(torch.zeros(()))
        self.moments[0] += 1
        self.total += torch.rand((), generator=self.noise)

    def replacing(self) -> None:
        self.total = self.total + 1

    def waiting(self) -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nwith more to say")

    def state(self) -> Iterator[Tensor]:
        yield self.total
        yield from self.moments


@pytest.mark.usefixtures("no_cuda")
def test_warming_up_leaves_no_trace() -> None:
    counter, untouched = Counter(), Generator().manual_seed(0)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        counter.step()

    steps = CudaGraphSteps([step], counter.state, [counter.noise])
    assert calls == cuda_graph.WARM_UP + 1
    assert steps.graph.generators == [counter.noise]  # type: ignore[attr-defined]
    # the recording itself does nothing on a device; here it was a call
    assert counter.moments[0] == 1
    assert counter.total == torch.rand((), generator=untouched)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("name", ["replacing", "waiting"])
def test_what_cannot_be_recorded_says_why_and_leaves_no_trace(name: str) -> None:
    counter = Counter()
    before = counter.total
    with pytest.raises(CudaGraphError, match={"replacing": "in place", "waiting": "^called a sync[a-z A-Z]*$"}[name]):
        CudaGraphSteps([getattr(counter, name)], counter.state, [counter.noise])
    assert before == 0


@pytest.mark.usefixtures("no_cuda")
def test_a_step_that_cannot_be_recorded_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CudaGraphError("it waits")

    monkeypatch.setattr("dgrad.training.step.CudaGraphSteps", fail)
    (step, lockstep), (plain, alone) = (ordinary_step(configure(SETTINGS)) for _ in range(2))
    step.uses_cuda_graph = True
    keep_rates_on_the_device(step)
    with pytest.warns(UserWarning, match=r"could not be recorded as a CUDA graph \(it waits\).*--compile off"):
        lockstep.advance()
    alone.advance()
    torch.testing.assert_close(step.loss_sum, plain.loss_sum)
    assert lockstep.cuda_graph is None
    assert not step.uses_cuda_graph


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_ordinary_run_on_the_same_device(case: str) -> None:
    settings = {**SETTINGS, **CASES[case], "device": "cuda"}
    (recorded, lockstep), (ordinary, alone) = (
        ordinary_step(configure({**settings, "compile": how})) for how in ("on", "off")
    )
    for _ in range(60):
        lockstep.advance()
        alone.advance()
    assert lockstep.cuda_graph is not None
    for name, tensor in recorded.loss.state_dict().items():
        torch.testing.assert_close(tensor, ordinary.loss.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)
