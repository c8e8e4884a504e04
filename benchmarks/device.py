"""What a CUDA device makes of training: recorded steps, the sweep's kernel at several settings, several seeds at once.

All but `measure` also works on a CPU, where nothing is recorded: so it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dgrad
from benchmarks.measuring import compared, peak_memory, take_turns
from benchmarks.reporting import Bars, Lines, Plot, Table, microseconds, ratio
from benchmarks.settings import Settings, sweep_problem
from dgrad.errors import InputError
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep
from dgrad.training.step import Lockstep
from dgrad.training.trainer import Trainer
from dgrad.vae.networks import Decoder

ABOUT = """Times of one step or one sweep, each the mean over a bunch that is launched without waiting. A step is a
whole training step of the linear model at batch 100; recorded, it is replayed as a CUDA graph; `eager` is the same
without recording. Peak memory is what building the run and its first steps take, the images included. Sweeps are
recorded too, so that launching them does not count; their error is the largest difference to the same in float64."""
REFERENCE = "gumbel-softmax"
ESTIMATORS = (REFERENCE, "st-gumbel-softmax", "direct", "direct-rb", "leg", "reinforce", "rloo")
QUICK = (REFERENCE, "direct-rb")
OF_THE_SEEDS = "direct-rb"
SEEDS = (1, 2, 4, 8, 16)
BATCH = 100
WARM_UP = 3
TUNINGS: dict[str, dict[str, int]] = {
    "kernel as it is": {},
    **{f"at most {count} examples": {"MOST_EXAMPLES": count} for count in (1, 2, 8)},
    **{f"at most {count} pixels": {"MOST_PIXELS": count} for count in (64, 256)},
    **{f"at most {count} numbers": {"MOST_NUMBERS": count} for count in (1024, 2048, 8192)},
    **{f"{count} factors a logarithm": {"MOST_TOGETHER": count} for count in (1, 8)},
    **{f"{count} warps": {"WARPS": count} for count in (2, 8)},
}
"""Constants of `dgrad.kernels.triton_sweep`, each changed alone."""
TORCH = "exact form in torch"


def measure(settings: Settings) -> dict[str, Any]:
    """Steps, sweeps and seeds in parallel by latent.

    Raises:
        InputError: the device is no CUDA device.
    """
    if settings.device.type != "cuda":
        raise InputError(f"device needs a CUDA device; got {settings.device.type}")
    parts = {"steps": step_times, "sweep": sweep_times, "seeds": seed_times}
    return {name: {latent: part(settings, latent) for latent in settings.latents} for name, part in parts.items()}


def step_times(settings: Settings, latent: str) -> dict[str, dict[str, Any]]:
    """Times of a step of each estimator that supports the latent, recorded and eager."""
    layer = dgrad.latent(latent)
    names = dict.fromkeys([REFERENCE, *(settings.estimators or (QUICK if settings.quick else ESTIMATORS))])
    bunch = _bunch(settings)
    trainers: dict[str, Trainer] = {}
    memory: dict[str, int] = {}

    def begin(label: str, name: str, *, eager: bool) -> None:
        trainer = trainers[label] = Trainer(settings.training(name, latent, steps=_steps(settings)))
        step = trainer.training_step
        step.uses_cuda_graph = step.uses_cuda_graph and not eager
        _repeat(trainer.train_step, bunch)

    for name in names:
        if dgrad.estimator(name).traits.supports(layer):
            for label, eager in ((name, False), (f"{name}, eager", True)):
                memory[label] = peak_memory(
                    lambda label=label, name=name, eager=eager: begin(label, name, eager=eager), settings.device
                )  # type: ignore[misc]
    actions = {label: lambda trainer=trainer: _repeat(trainer.train_step, bunch) for label, trainer in trainers.items()}  # type: ignore[misc]
    times = take_turns(actions, settings.rounds_or(30), settings.device, warm_up=WARM_UP)
    rows = compared(_each(times, bunch), REFERENCE)
    for label, row in rows.items():
        row["recorded"] = trainers[label].training_step.device_step is not None
        row["peak_memory"] = memory[label]
    return rows


def seed_times(settings: Settings, latent: str) -> dict[str, dict[str, Any]]:
    """Times of a step of one seed, by the number of seeds that train at once: their time over their number."""
    counts = SEEDS[:2] if settings.quick else SEEDS
    bunch = _bunch(settings)
    locksteps: dict[int, Lockstep] = {}
    memory: dict[int, int] = {}

    def begin(count: int) -> None:
        configs = [settings.training(OF_THE_SEEDS, latent, steps=_steps(settings), seed=seed) for seed in range(count)]
        first = Trainer(configs[0])
        trainers = [first, *(Trainer(config, data=first.data) for config in configs[1:])]
        locksteps[count] = Lockstep([trainer.training_step for trainer in trainers])
        _repeat(locksteps[count].advance, bunch)

    for count in counts:
        memory[count] = peak_memory(lambda count=count: begin(count), settings.device)  # type: ignore[misc]
    actions = {str(count): lambda each=each: _repeat(each.advance, bunch) for count, each in locksteps.items()}  # type: ignore[misc]
    times = take_turns(actions, settings.rounds_or(30), settings.device, warm_up=WARM_UP)
    rows = compared({count: [value / bunch / int(count) for value in values] for count, values in times.items()}, "1")
    for count in counts:
        rows[str(count)]["peak_memory"] = memory[count]
    return rows


def sweep_times(settings: Settings, latent: str) -> dict[str, dict[str, Any]]:
    """Times and errors of the sweep in torch and of the kernel at each tuning; `problem` says why one did not run."""
    model, codes, images = sweep_problem(latent, BATCH, settings.device)
    assert isinstance(model.decoder, Decoder)
    first, pixels = model.decoder.first, images.flatten(1)
    with torch.no_grad():
        logits = first(codes.flatten(2))
        loss = model.likelihood.loss(logits, pixels)
    arguments = (codes, first.weight.detach(), logits, pixels, loss)
    truth = bernoulli_linear_sweep(*(tensor.double() for tensor in arguments))
    bunch = _bunch(settings)
    actions: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    problems: dict[str, dict[str, Any]] = {}
    for label, constants in {TORCH: {}, **TUNINGS}.items():
        sweep = lambda compiled=label != TORCH: bernoulli_linear_sweep(*arguments, compiled=compiled)  # noqa: E731
        try:
            with _tuned(constants):
                error = (sweep().double() - truth).abs().max().item()
                facts[label] = {"error": error, "peak_memory": peak_memory(sweep, settings.device)}
                actions[label] = _recorded(sweep, bunch, settings.device)
        except Exception as error:  # a tuning that this device has no room for: whatever Triton or the driver says
            problems[label] = {"problem": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    times = take_turns(actions, settings.rounds_or(30), settings.device, warm_up=WARM_UP)
    rows = compared(_each(times, bunch), TORCH)
    return {**{label: {**row, **facts[label]} for label, row in rows.items()}, **problems}


@contextmanager
def _tuned(constants: Mapping[str, int]) -> Iterator[None]:
    """The kernel with other constants."""
    if not constants:
        yield
        return
    from dgrad.kernels import triton_sweep

    before = {name: getattr(triton_sweep, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(triton_sweep, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(triton_sweep, name, value)


def _recorded(action: Callable[[], Tensor], times: int, device: torch.device) -> Callable[[], object]:
    """The action so many times over, on CUDA as one graph."""
    if device.type != "cuda":
        return lambda: _repeat(action, times)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _repeat(action, times)
    return graph.replay


def _repeat(action: Callable[[], object], times: int) -> None:
    for _ in range(times):
        action()


def _bunch(settings: Settings) -> int:
    return 2 if settings.quick else 50


def _steps(settings: Settings) -> int:
    """How many steps a run makes in all: a recorded one knows its schedules that far."""
    return _bunch(settings) * (1 + WARM_UP + settings.rounds_or(30))


def _each(times: Mapping[str, list[float]], bunch: int) -> dict[str, list[float]]:
    return {label: [value / bunch for value in values] for label, values in times.items()}


def tables(figures: dict[str, Any]) -> list[Table]:
    """For each latent its steps, then the sweeps, then the seeds."""
    columns = ["step", "median, us", "quartiles, us", f"/ {REFERENCE}", "recorded", "peak memory, MiB"]
    result = []
    for latent, rows in figures["steps"].items():
        ordered = sorted(rows.items(), key=lambda item: item[1]["median"])
        lines = [
            [name, *microseconds(row), ratio(row, REFERENCE), "yes" if row["recorded"] else "no", _mebibytes(row)]
            for name, row in ordered
        ]
        result.append(Table(f"steps, {latent}, batch {BATCH}", columns, lines))
    columns = ["sweep", "median, us", "quartiles, us", "torch / this", "error, nats", "peak memory, MiB"]
    for latent, rows in figures["sweep"].items():
        lines = [
            [name, row["problem"], *["-"] * 4]
            if "problem" in row
            else [name, *microseconds(row), ratio(row, TORCH, inverse=True), f"{row['error']:.1g}", _mebibytes(row)]
            for name, row in rows.items()
        ]
        result.append(Table(f"sweep, {latent}, batch {BATCH}", columns, lines))
    columns = ["seeds at once", "median, us", "quartiles, us", "/ one seed", "peak memory, MiB"]
    for latent, rows in figures["seeds"].items():
        lines = [[count, *microseconds(row), ratio(row, "1"), _mebibytes(row)] for count, row in rows.items()]
        result.append(Table(f"time of one seed's step, {OF_THE_SEEDS}, {latent}", columns, lines))
    return result


def _mebibytes(row: Mapping[str, Any]) -> str:
    return f"{row['peak_memory'] / 2**20:.1f}"


def plots(figures: dict[str, Any]) -> list[Plot]:
    """Ratios of the recorded steps, and the time of a seed's step by the number of seeds."""
    recorded = {
        latent: {name: row["ratios"][REFERENCE] for name, row in rows.items() if not name.endswith(", eager")}
        for latent, rows in figures["steps"].items()
    }
    seeds = {
        latent: {OF_THE_SEEDS: ([float(count) for count in rows], [1e6 * row["median"] for row in rows.values()])}
        for latent, rows in figures["seeds"].items()
    }
    return [
        Bars("device-steps", f"recorded training step: median / {REFERENCE}'s", recorded),
        Lines("device-seeds", "seeds in parallel", "seeds at once", "us for one seed's step", seeds),
    ]
