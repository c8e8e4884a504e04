"""What every part of the benchmarks is told, and the models and images that several of them time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.config import TrainConfig, configure
from dgrad.files.atomic import write_text
from dgrad.kernels.code_sweeps import SPREAD_LIMIT
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.models._dense import linear_vae, mlp_vae

MODELS = {"linear": linear_vae, "mlp": mlp_vae}
SHAPE = (1, 28, 28)
PIXELS = 28 * 28


@dataclass(frozen=True)
class Settings:
    """How the benchmarks are run.

    Attributes:
        data: the settings of training that say where the images are.
        mnist: whether they are MNIST's.
        rounds: measured turns; None for what suits each part.
        quick: few rounds of few small cases, to see that everything works.
        estimators: names; None for what suits each part.
        seconds: of training after which `run` gives an estimator up.
        compile: whether compiled kernels do the sweep.
        unfinished: the file that keeps the cases of an interrupted part; None where none are kept.
    """

    data: dict[str, str] = field(default_factory=dict)
    mnist: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int | None = None
    quick: bool = False
    latents: tuple[str, ...] = ("20x10", "20x2", "1x40")
    estimators: tuple[str, ...] | None = None
    seconds: float = 120.0
    compile: str = "on"
    unfinished: Path | None = None

    def rounds_or(self, usual: int) -> int:
        """As many rounds as were asked for, else the part's usual number."""
        return self.rounds or (3 if self.quick else usual)

    def kept(self, case: str, measured: Callable[[], Any]) -> Any:
        """The figures of a case: those that an interrupted measurement kept, or else new ones, which are kept too."""
        if self.unfinished is None:
            return measured()
        known = json.loads(self.unfinished.read_text(encoding="utf-8")) if self.unfinished.exists() else {}
        if case not in known:
            known[case] = measured()
            write_text(self.unfinished, json.dumps(known))
        return known[case]

    def training(self, estimator: str, latent: str, **changes: Any) -> TrainConfig:
        """The configuration of a training run that is timed."""
        given = {"estimator": estimator, "latent": latent, "device": str(self.device), "compile": self.compile}
        return configure({**self.data, **given, **changes})


def invented_images(directory: Path) -> Path:
    """A file of MNIST-sized binary images, a fifth of their pixels set."""
    path = directory / "invented.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=(rng.random((2000, 28, 28)) < 0.2).astype(np.uint8) * np.uint8(255))
    return path


def sweep_problem(
    latent: str, batch: int, device: torch.device, *, hidden: tuple[int, ...] = ()
) -> tuple[DiscreteVAE, Tensor, Tensor]:
    """A model with weights about as large as trained ones, codes `[1, B, n, k]` and invented images `[B, 1, 28, 28]`.

    No hidden layers make it the linear model.
    """
    generator = Generator().manual_seed(0)
    layer = dgrad.latent(latent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS["mlp" if hidden else "linear"](layer, SHAPE, likelihood("bernoulli"), hidden)
    if not hidden:
        first = model.decoder.first
        assert isinstance(first, torch.nn.Linear)
        torch.nn.init.normal_(first.weight, std=0.5, generator=generator)
    codes = layer.sample(torch.zeros(batch, *layer.shape), generator=generator)
    images = (torch.rand(batch, *SHAPE, generator=generator) < 0.2).float()
    return model.to(device), codes.to(device), images.to(device)


def widely_spread(weight: Tensor) -> Tensor:
    """The weight with an entry beyond what the forms that multiply can bear: on a CPU the exact form is taken."""
    changed = weight.detach().clone()
    changed[0, 0] += 2 * SPREAD_LIMIT
    return changed
