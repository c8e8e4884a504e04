"""One process of several that test_distributed.py starts under torchrun, and the plugin that its runs load.

torchrun ... distributed_processes.py train DIR       trains several trainers, and saves their results in DIR
torchrun ... distributed_processes.py cli COMMAND...  runs commands of dgrad one after the other, separated by `+`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import dgrad
from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Traits
from dgrad.config import TrainConfig, configure
from dgrad.data import Batch
from dgrad.training.processes import ProcessGroup
from dgrad.training.trainer import Trainer
from dgrad.vae.posterior import EncodedBatch

SETTINGS = {"latent": "2x3", "device": "cpu", "steps": 100, "plugin": [__file__]}
DETERMINISTIC = {**SETTINGS, "estimator": "averaging-exact", "binarize": "dynamic"}
STEPS = 15
"""Of 13 batches in an epoch, the last of an odd number of images."""


class AveragingExact(GradientEstimator):
    """The exact gradient, with the moving average of the loss, as estimators have it, in a buffer."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.exact = dgrad.estimator("exact")
        self.register_buffer("average", torch.zeros(()))

    @property
    def traits(self) -> Traits:
        return self.exact.traits

    def estimate(
        self, layer: LatentLayer, logits: Tensor, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        estimate = self.exact(layer, logits, objective, generator=generator)
        self.average.mul_(0.9).add_(0.1 * estimate.loss.mean().detach())
        return estimate


@dgrad.hookimpl
def dgrad_register_estimators(register: Any) -> None:
    register("averaging-exact", AveragingExact)


@dgrad.hookimpl
def dgrad_train_start(run: Path, config: TrainConfig) -> None:
    with (run / "hooks.txt").open("a") as file:
        file.write(f"started by {os.getpid()}\n")


class Centred(nn.Module):
    """The mean square of the logits about a learned centre, with their moving average in a buffer."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.ones(()))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, encoded: EncodedBatch) -> Tensor:
        logits = encoded.posterior.logits
        self.average.mul_(0.9).add_(0.1 * logits.detach().mean())
        return (logits - self.centre).square().mean()


@dgrad.hookimpl
def dgrad_batch_losses() -> dict[str, nn.Module]:
    return {"centred": Centred()}


_batches = 0


@dgrad.hookimpl
def dgrad_code_losses(batch: Batch, config: TrainConfig) -> None:
    """Where the environment asks for it, the second process is told to stop in its 16th step."""
    global _batches
    _batches += 1
    if _batches == 16 and "TEST_STOP" in os.environ and os.environ["TEST_STOP"] == os.environ["RANK"]:
        os.kill(os.getpid(), signal.SIGTERM)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training moves."""
    of_plugins = trainer.training_step.loss.batch_losses.state_dict()
    return {**trainer.model.state_dict(), **trainer.estimator.state_dict(prefix="estimator."), **of_plugins}


def train(folder: Path) -> None:
    group = ProcessGroup.from_environment()
    with group.joined("cpu"):
        trainer = Trainer(configure(DETERMINISTIC), None, group)
        noise = torch.rand(8, generator=trainer.training_step.noise.clone_state())
        for _ in range(STEPS):
            trainer.train_step()
        loss = group.sum(trainer.training_step.loss_sum) / group.size / STEPS
        deterministic = {"weights": weights(trainer), "noise": noise, "loss": loss}
    estimators: dict[str, dict[str, Tensor]] = {}
    with group.joined("cpu"):  # again: nothing of the first connection is in the way
        for name in dgrad.estimators():
            layer = dgrad.latent("3x4")
            latent = "3x4" if dgrad.estimator(name).traits.supports(layer) else "3x2"
            trainer = Trainer(configure({**SETTINGS, "estimator": name, "latent": latent}), None, group)
            for _ in range(3):
                trainer.train_step()
            estimators[name] = weights(trainer)
        trainer = Trainer(configure({**SETTINGS, "estimator": "leg", "refine-steps": 2}), None, group)
        for _ in range(3):
            trainer.train_step()
        estimators["leg, refined"] = weights(trainer)
    torch.save({"deterministic": deterministic, "estimators": estimators}, folder / f"{group.rank}.pt")


def cli(arguments: list[str]) -> None:
    from dgrad_cli.main import main

    while arguments:
        end = arguments.index("+") if "+" in arguments else len(arguments)
        try:
            main(arguments[:end])
        except SystemExit as exit_:
            if exit_.code:
                raise
        arguments = arguments[end + 1 :]


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    else:
        cli(sys.argv[2:])
