"""The figures of a run: evaluation on the validation images, the best weights by it, and the summary."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgrad
from dgrad.config import TrainConfig
from dgrad.data import Split
from dgrad.errors import RunError
from dgrad.training.listener import Progress
from dgrad.training.step import TrainingStep
from dgrad.vae.evaluation import Bound, evaluate_accuracies, evaluate_bound, evaluation_generator, grey_figures
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.usage import code_usage


class Figures:
    """What is measured of a model while it is trained. Each evaluation begins with the same noise.

    Args:
        valid: the validation images as they are evaluated, on the device.
        test: the test images.

    Attributes:
        best: the validation figures of the best weights so far.
        best_weights: these weights; empty before the first evaluation.
    """

    def __init__(self, config: TrainConfig, model: DiscreteVAE, valid: Split, test: Split) -> None:
        self.config = config
        self.model = model
        self.splits = {"valid": valid, "test": test}
        self.best: dict[str, Any] = {"valid_bound": math.inf}
        self.best_weights: dict[str, Tensor] = {}

    def validate(self) -> dict[str, float]:
        """The figures of the validation images."""
        bound = self._bound("valid", samples=1, refine_steps=self.config.steps_to_evaluate)
        return {
            "valid_bound": bound.bound,
            "valid_reconstruction": bound.reconstruction,
            "valid_kl": bound.kl,
            **({} if bound.gaussian_kl is None else {"valid_gaussian_kl": bound.gaussian_kl}),
            **self._of_grey_pixels("valid", bound.bound),
            **self._accuracies("valid"),
        }

    def evaluate(self, step: TrainingStep, seconds: float, path: Path) -> dict[str, Any]:
        """The metrics after a step, which begin the sum of the training losses anew. The best weights are kept.

        Args:
            seconds: how long the run has been trained.
            path: of the run, for the error.

        Raises:
            RunError: the loss is not finite.
        """
        metrics = {"epoch": step.epoch, "step": step.number, "train_loss": step.mean_loss(), **self.validate()}
        train, valid = metrics["train_loss"], metrics["valid_bound"]
        if not (math.isfinite(train) and math.isfinite(valid)):
            raise RunError(
                f"the loss is not finite (training {train:g}, validation {valid:g}) at step {step.number}; "
                f"{path} keeps its last good checkpoint: "
                "train again with a lower --lr, or another epsilon or temperature"
            )
        step.forget_losses()
        metrics |= {**step.scheduled_values(), "seconds": seconds}
        self.keep_best(metrics)
        return metrics

    def keep_best(self, metrics: Mapping[str, Any]) -> None:
        """Copy the weights if these figures of theirs are the best so far."""
        criterion = self.config.criterion
        if self.best_weights and selection_key(metrics, criterion) <= selection_key(self.best, criterion):
            return
        chosen_by = {"epoch", "step", "valid_bound", "valid_reconstruction"}
        self.best = {
            name: value for name, value in metrics.items() if name in chosen_by or name.startswith("valid_accuracy")
        }
        self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def summarize(self, progress: Progress) -> dict[str, Any]:
        """The figures of the test images, and how they came about. The model has its best weights afterwards."""
        config, run = self.config, progress.run
        parameters = sum(tensor.numel() for tensor in self.model.state_dict().values())
        final = {"epoch": progress.epoch, "step": progress.step, **self._test(), "code": self._code()}
        self.model.load_state_dict(self.best_weights)
        best = {**self.best, **self._test(), "code": self._code()}
        return {
            "test_bound": best["test_bound"],
            **({"accuracy": best["test_accuracy"]} if config.labels else {}),
            "unit": run.unit,
            "best": best,
            "final": final,
            "estimator": config.estimator,
            "latent": config.latent,
            "dataset": config.dataset,
            "epochs": progress.epoch,
            "steps": progress.step,
            "seconds": progress.seconds,
            "processes": run.processes,
            "device": run.device,
            "versions": {
                "dgrad": dgrad.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "parameters": parameters,
        }

    def _test(self) -> dict[str, float | None]:
        samples, refine_steps = self.config.eval_samples, self.config.steps_to_evaluate
        bound = self._bound("test", samples=samples, refine_steps=refine_steps)
        figures = {f"test_{name}": value for name, value in asdict(bound).items() if value is not None}
        if refine_steps:
            figures["test_encoder_bound"] = self._bound("test", samples=samples, refine_steps=0).bound
        figures |= self._of_grey_pixels("test", bound.bound) | self._accuracies("test")
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def _code(self) -> dict[str, Any]:
        """What the code is used for among the test images."""
        images = self.splits["test"]
        generator = evaluation_generator(images.images.device, self.config.seed)
        return code_usage(self.model, images, generator=generator).to_json()

    def _bound(self, split: str, *, samples: int, refine_steps: int) -> Bound:
        images = self.splits[split]
        generator = evaluation_generator(images.images.device, self.config.seed)
        return evaluate_bound(self.model, images, samples=samples, generator=generator, refine_steps=refine_steps)

    def _of_grey_pixels(self, split: str, bound: float) -> dict[str, float]:
        if self.config.binarize != "none":
            return {}
        figures = grey_figures(self.model, self.splits[split], bound)
        return {f"{split}_{name}": value for name, value in figures.items()}

    def _accuracies(self, split: str) -> dict[str, float]:
        if not self.config.labels:
            return {}
        accuracies = evaluate_accuracies(self.model, self.splits[split], self.config.attributes)
        return {f"{split}_{name}": value for name, value in accuracies.items()}


def selection_key(figures: Mapping[str, Any], criterion: str) -> tuple[float, float]:
    """The greatest key chooses the weights: accuracy and then the bound, or the least bound or reconstruction."""
    if criterion == "accuracy":
        return figures["valid_accuracy"], -figures["valid_bound"]
    return 0.0, -figures[f"valid_{criterion}"]


def collapse_warning(code: Mapping[str, Any] | None, config: TrainConfig) -> str | None:
    """What to say of a collapsed code, and what to try; None for another.

    Args:
        code: the figures of `code_usage`, as the summary has them; None where they were not measured.
    """
    if code is None or code["collapsed"] is None:
        return None
    if config.model == "linear":
        near_one = "--estimator direct-rb --kl inside --set epsilon=stable-decay:1:0.1:0.6"
        ways = [] if config.estimator == "direct-rb" and config.kl == "inside" else [near_one]
        ways.append("a higher learning rate such as --lr cosine:0.1:0")
    else:  # behind hidden layers a high rate makes a decoder ignore its code
        ways = ["a lower learning rate such as --lr cosine:0.002:0", "--kl-weight 1"]
    return (
        f"the code has collapsed: {code['collapsed']}; try {', '.join([*ways, 'more epochs'])} (docs/guides/epsilon.md)"
    )


def figure_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's figures, as JSON has them: all but the device."""
    settings: dict[str, Any] = json.loads(config.to_json())
    del settings["device"]
    return settings
