"""Each model trains on the bundled digits with its defaults, and its code is what it learns by.

The tests cannot raise a false alarm by noise of the evaluation: where a model ignores its code, both bounds below hold
for every outcome of the draws. That a model which does learn has learned enough by then was measured with seeds 0 to 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dgrad.config import configure
from dgrad.data import Split, unit
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad.vae.model import DiscreteVAE

MODELS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 15},
    "mlp": {"epochs": 40},
    "conv": {"epochs": 30},
    "conv-gumbel-softmax": {"model": "conv", "estimator": "gumbel-softmax", "epochs": 20},
    "mixture": {"latent": "1x10", "epochs": 60},
}


def floor_without_a_latent(split: Split) -> float:
    """The entropy of the split's mean image, pixel by pixel, in nats.

    No fixed product of Bernoulli variables has a lower negative log-likelihood of these images (Gibbs' inequality).
    A model that ignores its latent variables is one.
    """
    mean = unit(split.images).double().mean(0).flatten()
    return float(-(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum())


@torch.no_grad()
def gain_of_the_code(model: DiscreteVAE, images: Tensor) -> float:
    """How much worse the reconstruction is with the codes of other images, in nats. A decoder that ignores them: 0."""
    posterior = model.posterior(images)
    generator = Generator().manual_seed(0)
    objective = model.reconstruction(images, posterior.draw(generator=generator))
    codes = model.layer.sample(posterior.logits, generator=generator)
    return float((objective(codes.roll(1, 1)) - objective(codes)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_model_learns_with_its_defaults(name: str, tmp_path: Path) -> None:
    config = configure({"model": name, "eval_every": 5, "device": "cpu", **MODELS[name]})
    trainer = Trainer(config)
    summary = trainer.train(Run.create(tmp_path / "run", trainer.config, first_save=trainer.save))
    test = trainer.data.test
    assert summary["test_bound"] < floor_without_a_latent(test) - 0.5
    assert gain_of_the_code(trainer.model, unit(test.images)) > 1
