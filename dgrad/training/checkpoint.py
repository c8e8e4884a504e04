"""Checkpoints: the file, what of a run is in it, and how a run goes on from it. Nothing is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from dgrad.config import TrainConfig, configure
from dgrad.errors import InputError
from dgrad.files.atomic import atomic_file
from dgrad.training.figures import Figures, figure_settings
from dgrad.training.processes import ProcessGroup
from dgrad.training.run_directory import Run
from dgrad.training.step import TrainingStep

SECONDS_BETWEEN_CHECKPOINTS = 10.0
STATE_KEYS = {"step", "epoch", "seconds", "losses_summed", "best", "image_shape", "config"}
"""What the JSON state of a checkpoint holds."""


class Checkpoint:
    """What of a run is saved, and restored: its weights, optimizer, batches, noise, best weights and settings.

    All processes of a group save and restore together. The first process writes.
    """

    def __init__(self, config: TrainConfig, step: TrainingStep, figures: Figures, group: ProcessGroup) -> None:
        self.config = config
        self.step = step
        self.figures = figures
        self.group = group
        self._saved_at = -math.inf

    def is_due(self, seconds: float) -> bool:
        """Whether it is time for another one, after so many seconds of training."""
        return seconds - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS

    def save(self, run: Run, seconds: float) -> None:
        """Write the checkpoint of the run.

        Args:
            seconds: how long the run has been trained.
        """
        own = {"noise": self.step.noise.get_state(), "loss_sum": self.step.loss_sum.cpu()}
        of_ranks = self.group.gather(own)
        if self.group.is_first:
            self._write(run.checkpoint_file, of_ranks, seconds)
        self._saved_at = self.group.from_first(lambda: seconds)

    def _write(self, path: Path, of_ranks: list[dict[str, Tensor]], seconds: float) -> None:
        step, figures = self.step, self.figures
        tensors = {
            **{
                f"{prefix}{name}": tensor
                for prefix, module in self._modules().items()
                for name, tensor in module.state_dict().items()
            },
            **{f"best.{name}": tensor for name, tensor in figures.best_weights.items()},
            **{
                f"optimizer.{index}.{name}": tensor
                for index, entry in step.optimizer.state_dict()["state"].items()
                for name, tensor in entry.items()
            },
            **{f"batches.{name}": tensor for name, tensor in step.batches.state_dict().items()},
            **{f"{_of_rank(rank)}{name}": tensor for rank, own in enumerate(of_ranks) for name, tensor in own.items()},
        }
        state = {
            "step": step.number,
            "epoch": step.epoch,
            "seconds": seconds,
            "losses_summed": step.losses_summed,
            "best": figures.best if figures.best_weights else None,
            "image_shape": step.loss.model.image_shape,
            "config": figure_settings(self.config),
            "processes": self.group.size,
        }
        save_checkpoint(path, tensors, state)

    def restore(self, run: Run) -> float:
        """Go on from the run's checkpoint, and return the seconds it was trained; a run without one begins anew.

        Metrics of later steps are dropped: they will be measured again.

        Raises:
            InputError: the checkpoint is missing, damaged, or does not fit the configuration.
        """
        if not run.checkpoint_file.exists() and not run.metrics():
            return 0.0  # killed before its first step
        tensors, state = load_checkpoint(run.checkpoint_file)
        ours, theirs = figure_settings(self.config), _as_written_now(state["config"])
        if ours != theirs:
            changed = sorted(name for name in ours if not isinstance(theirs, dict) or ours[name] != theirs.get(name))
            raise InputError(
                f"{run.config_file} was changed since the run began ({', '.join(changed)}); "
                "change it back, or start a new run"
            )
        processes = state.get("processes", 1)
        if processes != self.group.size:
            before = ProcessGroup(size=processes, local_size=processes).command
            raise InputError(
                f"{run.path} is a run of {processes} process(es), each with noise of its own; got {self.group.size}: "
                f"continue it with {before} train --resume {run.path}"
            )
        try:
            self._restore(run.checkpoint_file, tensors, state)
            self._saved_at = float(state["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise error if isinstance(error, InputError) else damaged(run.checkpoint_file, error) from None
        if self.group.is_first:
            run.drop_metrics_after(self.step.number)
        return self._saved_at

    def _restore(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        step, figures = self.step, self.figures
        for prefix, module in self._modules().items():
            load_state(module, tensors, prefix, path)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        if state["step"] > 0 and not moments:
            raise ValueError("it lacks the optimizer's state")
        step.optimizer.load_state_dict({**step.optimizer.state_dict(), "state": moments})
        step.batches.load_state_dict(_under("batches.", tensors))
        own = _of_rank(self.group.rank)
        step.noise.set_state(tensors[f"{own}noise"])
        step.loss_sum.copy_(tensors[f"{own}loss_sum"])
        step.number, step.losses_summed = state["step"], state["losses_summed"]
        figures.best = state["best"] or figures.best
        device = step.loss_sum.device
        figures.best_weights = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}

    def _modules(self) -> dict[str, nn.Module]:
        """What has weights or averages, by the beginning of their names."""
        loss = self.step.loss
        of_plugins = {f"{name}.": module for name, module in loss.batch_losses.items()}
        return {"model.": loss.model, "estimator.": loss.estimator, **of_plugins}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON state into one safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={"state": json.dumps(state)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON state of a checkpoint.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads((file.metadata() or {})["state"])
        if missing := STATE_KEYS - (state.keys() if isinstance(state, dict) else set()):
            raise ValueError(f"its state lacks {', '.join(sorted(missing))}")
        return tensors, state
    except OSError as error:
        raise InputError(
            f"cannot read checkpoint {path}: {error.strerror or error}; expected the run's checkpoint.safetensors"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None


def load_state(module: Any, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Load the tensors whose names start with `prefix` into a module.

    Raises:
        InputError: names or shapes do not fit.
    """
    try:
        module.load_state_dict(_under(prefix, tensors))
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InputError(f"checkpoint {path} does not fit the model of its config.json: {detail}") from None


def damaged(path: Path, error: Exception) -> InputError:
    """The error for a checkpoint that cannot be what a run wrote."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"checkpoint {path} is damaged ({detail}); restore it from a copy or train again")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _as_written_now(settings: Any) -> Any:
    """The settings of a checkpoint, which may be older than some of them; as they are where they are no settings."""
    try:
        return figure_settings(configure(settings))
    except (InputError, TypeError, AttributeError):
        return settings


def _of_rank(rank: int) -> str:
    """The beginning of the names of what each process has of its own; nothing for the first, which may be alone."""
    return f"rank{rank}." if rank else ""
