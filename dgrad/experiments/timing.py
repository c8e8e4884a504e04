"""Times of training steps as the latent grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dgrad.config import TrainConfig
from dgrad.devices import choose_device, synchronize
from dgrad.training.batches import TrainingData
from dgrad.training.build import Build
from dgrad.training.trainer import Trainer


def step_times(
    configs: Mapping[str, TrainConfig], latents: Mapping[str, str], sizes: Sequence[int], rounds: int, warm_up: int = 2
) -> dict[str, dict[int, float]]:
    """The median seconds of a training step of each configuration as its latent grows, those of one size taking turns.

    Args:
        configs: by label.
        latents: by label, the spec of the latent with `{}` for its size.

    Returns:
        By label, then by size.
    """
    times: dict[str, dict[int, float]] = {label: {} for label in configs}
    if not configs:
        return times
    first = next(iter(configs.values()))
    data = TrainingData(Build(first), choose_device(first.device))
    for size in sizes:
        trainers = {
            label: Trainer(replace(config, latent=latents[label].format(size)), data=data)
            for label, config in configs.items()
        }
        taken: dict[str, list[float]] = {label: [] for label in trainers}
        for _ in range(warm_up + rounds):
            for label, trainer in trainers.items():
                synchronize(trainer.device)
                start = time.perf_counter()
                trainer.train_step()
                synchronize(trainer.device)
                taken[label].append(time.perf_counter() - start)
        for label, values in taken.items():
            times[label][size] = statistics.median(values[warm_up:])
    return times
