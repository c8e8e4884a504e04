"""dgrad as a library against the same step without it, and the trainer against torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dgrad
from benchmarks.measuring import compared, take_turns
from benchmarks.plain import PLAIN, dense, optimized, plain_step, plain_steps
from benchmarks.reporting import Bars, Table, milliseconds, ratio
from benchmarks.settings import PIXELS, Settings
from dgrad.training.trainer import Trainer

ABOUT = """Steps of dgrad in a loop of one's own, batch 100, with a fused Adam. Each case divides by the same step
without dgrad, its first row: Gumbel-softmax in plain torch, or the exact gradient of one variable by hand. The last
case has the trainer's steps and divides by the plain step under `torch.compile`. Times are those of the processor."""
BY_HAND = "by hand"
BATCH = 100
FEATURES = 64
ACTIONS = 5000
VECTORS, WIDTH = 320, 16
"""Of the codebook."""
SECONDS_EACH = 20
"""A contestant that has taken so long takes no more turns."""
Steps = dict[str, Callable[[], object]]


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step, `{case: {contestant: ...}}`; the first of each case is its reference."""
    return {name: settings.kept(name, partial(_timed, settings, steps)) for name, steps in _cases(settings)}


def _timed(settings: Settings, make: Callable[[], Steps]) -> dict[str, dict[str, Any]]:
    steps = make()
    warm_up = 1 if settings.quick else 5
    times = take_turns(
        steps,
        settings.rounds_or(60),
        settings.device,
        warm_up=warm_up,
        seconds_each=SECONDS_EACH,
        of_processor=settings.device.type == "cpu",
    )
    return compared(times, next(iter(steps)))


def _cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Steps]]]:
    for latent in settings.latents:
        yield f"README's lines, {latent}", partial(readme, settings, latent, [])
    if settings.quick:
        yield "a codebook, 1x4", partial(codebook, settings, 4)
        yield "lookups, 1x5", partial(bandit, settings, 5)
    else:
        share = {"sweep_share": 0.1}
        yield "own decoder 200-300-784, 20x10, a tenth of the sweep", partial(readme, settings, "20x10", [300], **share)
        yield f"a codebook, 1x{VECTORS}", partial(codebook, settings, VECTORS)
        yield f"lookups, 1x{ACTIONS}", partial(bandit, settings, ACTIONS)
    yield f"trainer, {settings.latents[0]}", partial(trainers, settings)


def readme(settings: Settings, latent: str, hidden: list[int], **hyper: Any) -> Steps:
    """README's lines with two estimators, against Gumbel-softmax.

    Args:
        hidden: the widths of hidden layers behind the code; the encoder has the same.
    """
    layer = dgrad.latent(latent)
    images = (torch.rand(BATCH, PIXELS) < 0.2).float().to(settings.device)

    def step_of(name: str) -> Callable[[], None]:
        size = math.prod(layer.shape)
        encoder = dense([PIXELS, *hidden, size]).to(settings.device)
        decoder = dense([size, *reversed(hidden), PIXELS]).to(settings.device)
        estimator, update = dgrad.estimator(name, **hyper).to(settings.device), optimized(encoder, decoder)

        def step() -> None:
            logits = encoder(images).view(-1, *layer.shape)
            estimate = estimator(layer, logits, dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(images)))
            update(estimate.loss.mean() + layer.kl(logits).mean())

        return step

    n, k = layer.shape
    return {PLAIN: plain_step(images, n, k, hidden)} | {name: step_of(name) for name in ("direct", "direct-rb")}


def bandit(settings: Settings, actions: int) -> Steps:
    """A choice among actions whose costs stand in a table: `leg` against the exact gradient by a gather."""
    layer = dgrad.latent(f"1x{actions}")
    costs = torch.rand(BATCH, actions, device=settings.device)
    states = torch.randn(BATCH, FEATURES, device=settings.device)
    examples = torch.arange(BATCH, device=settings.device)
    every = torch.arange(actions, device=settings.device).unsqueeze(1)

    def with_dgrad() -> Callable[[], None]:
        policy = nn.Linear(FEATURES, actions).to(settings.device)
        estimator, update = dgrad.estimator("leg").to(settings.device), optimized(policy)

        objective = dgrad.objective(lambda indices: costs[examples, indices[..., 0]], indices=True)
        return lambda: update(estimator(layer, policy(states).unsqueeze(1), objective).loss.mean())

    def by_hand() -> Callable[[], None]:
        policy = nn.Linear(FEATURES, actions).to(settings.device)
        update = optimized(policy)
        return lambda: update((policy(states).softmax(-1).T * costs[examples, every]).sum(0).mean())

    return {BY_HAND: by_hand(), "leg": with_dgrad()}


def codebook(settings: Settings, vectors: int) -> Steps:
    """A vector near a target, out of a codebook: `exact` of a function against the same sum by hand."""
    layer = dgrad.latent(f"1x{vectors}")
    features, targets = (torch.randn(BATCH, size, device=settings.device) for size in (FEATURES, WIDTH))

    def networks() -> tuple[nn.Linear, nn.Linear, Callable[[Tensor], None]]:
        encoder, book = nn.Linear(FEATURES, vectors), nn.Linear(vectors, WIDTH, bias=False)
        encoder, book = encoder.to(settings.device), book.to(settings.device)
        return encoder, book, optimized(encoder, book)

    def with_dgrad() -> Callable[[], None]:
        encoder, book, update = networks()
        estimator = dgrad.estimator("exact").to(settings.device)

        def distance(codes: Tensor) -> Tensor:
            return (book(codes.flatten(-2)) - targets).square().sum(-1)

        return lambda: update(estimator(layer, encoder(features).unsqueeze(1), distance).loss.mean())

    def by_hand() -> Callable[[], None]:
        encoder, book, update = networks()

        def step() -> None:
            distances = (book.weight.T.unsqueeze(1) - targets).square().sum(-1)  # [k, B]
            update((encoder(features).softmax(-1).T * distances).sum(0).mean())

        return step

    return {BY_HAND: by_hand(), "exact": with_dgrad()}


def trainers(settings: Settings) -> Steps:
    """The plain step under torch.compile where there is a compiler, the plain step, and the trainer's steps."""
    latent, names = settings.latents[0], ("gumbel-softmax", "direct-rb")
    ours = {name: Trainer(settings.training(name, latent, epochs=1000)) for name in names}
    n, k = dgrad.latent(latent).shape
    images = next(ours[names[0]].batches).images.flatten(1)
    plain = plain_steps(images, n, k, [], compiled=not settings.quick)
    return dict(reversed(plain.items())) | {name: trainer.train_step for name, trainer in ours.items()}


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each case; the ratios are to its first row."""
    columns = ["step", "median, ms", "quartiles, ms", "ratio to the first"]
    return [
        Table(case, columns, [[name, *milliseconds(row), ratio(row, next(iter(rows)))] for name, row in rows.items()])
        for case, rows in figures.items()
    ]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """None: the tables are short."""
    return []
