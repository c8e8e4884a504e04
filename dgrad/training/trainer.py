"""Training: builds everything from a configuration, runs the steps, evaluates, keeps checkpoints. May import all of the core.

Three generators, none of which feeds another: the order of the data (and dynamic binarisation), the noise of training (input dropout,
the estimator), and evaluation, which starts afresh each time. Nothing in a step waits for the device.
"""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import dgrad
from dgrad import registry
from dgrad.config import TrainConfig, configure
from dgrad.core.schedules import Constant, schedule
from dgrad.data import Batch, SemiSupervisedBatches
from dgrad.devices import describe_device
from dgrad.errors import CompilerWarning, InputError, RunError
from dgrad.files.atomic import write_text
from dgrad.training.batches import TrainingData, training_batches
from dgrad.training.build import build_model, load_state, resolve
from dgrad.training.checkpoint import damaged, load_checkpoint, save_checkpoint
from dgrad.training.cuda_graph import CapturedSteps, DeviceStep, NotCapturable
from dgrad.training.listener import Listener
from dgrad.training.loss import SharedLoss, TrainingLoss
from dgrad.training.processes import World
from dgrad.training.run_directory import Run
from dgrad.vae.evaluation import Bound, evaluate_accuracies, evaluate_bound, evaluation_generator
from dgrad.vae.model import DiscreteVAE

SECONDS_BETWEEN_CHECKPOINTS = 10.0
STEPS_WORTH_COMPILING = 500
"""With `--compile auto`: about as many steps as win back the second or two that compiling takes. It depends on nothing else, so that a
configuration gives the same figures the first time and later."""
STEPS_BETWEEN_AGREEMENTS = 10
"""Several processes must stop after the same step: they ask each other every so many steps whether one of them was told to."""


class Interrupted(RunError):
    """The run was asked to stop; its state is saved."""

    exit_code = 130


class Trainer:
    """One training run.

    Building one loads the data and makes the networks but writes nothing, so that whatever is wrong with a configuration comes
    out before there is a run directory. `train(run)` does the rest.

    With several processes (`world`, inside `world.joined`) each has its part of every batch and noise of its own, and all have the same
    weights; the first writes, calls the hooks and is listened to.

    Args:
        data: of a run that differs from this one in its seed at most, to share it; None to load it.

    Raises:
        InputError: something in the configuration cannot be.
        RunError: the data could not be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        listener: Listener | None = None,
        world: World | None = None,
        data: TrainingData | None = None,
    ) -> None:
        self.world = world or World()
        for plugin in config.plugins:
            registry.load_plugin(plugin)
        self.device = self.world.device(config.device)
        self.estimator = registry.estimator(config.estimator, **config.set)
        layer = registry.latent(config.latent)
        traits = self.estimator.traits
        limitation = traits.limitation(layer)
        if limitation is not None:
            raise InputError(limitation)
        self.config = config = resolve(replace(config, kl=config.kl or ("inside" if traits.kl_inside else "outside")))
        self.listener = listener if listener is not None and self.world.is_first else Listener()
        self.data = TrainingData(config, self.device) if data is None else data.with_seed_of(config)
        if config.labels and self.data.dataset.attributes is not None:
            self.config = config = replace(config, attributes=self.data.dataset.attributes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model: DiscreteVAE = build_model(config, self.data.dataset.image_shape)
            self.estimator.set_layer(layer)
        self.model.to(self.device)
        self.estimator.to(self.device)

        self.batches = training_batches(config, self.data, layer, self.world)
        self.noise = Generator(self.device).manual_seed(self.world.noise_seed(config.seed))
        self.model.set_generator(self.noise)
        self.total_steps = config.steps if config.steps is not None else config.epochs * self.batches.steps_per_epoch
        self._worth_compiling = config.compile == "on" or (
            config.compile == "auto" and self.total_steps >= STEPS_WORTH_COMPILING
        )
        self.model.compiled_kernels = self._worth_compiling
        self.model.sweep_dtype = getattr(torch, config.sweep_precision)
        self.lr = schedule(config.lr).over(self.total_steps)
        self.loss = TrainingLoss(self.model, self.estimator, config, self.noise, self._labels()).to(self.device)
        self.loss.set_run_length(self.total_steps)
        alone = self.world.size == 1
        self.captures = alone and self.device.type == "cuda" and self._worth_compiling and self.loss.recordable
        self.optimizer = self._make_optimizer()
        self.shared_loss = None if alone else SharedLoss(self.loss, self.world)

        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, Any] = {"valid_bound": math.inf}
        self.best_weights: dict[str, Tensor] = {}
        self.loss_sum = torch.zeros((), device=self.device)
        self.losses_summed = 0
        self.device_step: DeviceStep | None = None
        self.captured: CapturedSteps | None = None
        self._stop = False
        self._saved_at = -math.inf
        self._started = 0.0

    @property
    def epoch(self) -> float:
        """How many epochs are done; a fraction in the middle of one."""
        return self.step / self.batches.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.total_steps

    @property
    def labelled_images(self) -> int:
        """How many images count as labelled: `labels` and those that these were spread to."""
        return len(self.batches.labelled.index) if isinstance(self.batches, SemiSupervisedBatches) else 0

    def _labels(self) -> Tensor | None:
        return self.batches.labelled.labels if isinstance(self.batches, SemiSupervisedBatches) else None

    def _make_optimizer(self) -> torch.optim.AdamW:
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        others += [*self.estimator.parameters(), *self.loss.batch_losses.parameters()]
        if self.config.weight_decay:
            groups = [
                {"params": decayed, "weight_decay": self.config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
        else:  # one group of the same order: each group costs a step's time
            groups = [{"params": decayed + others, "weight_decay": 0.0}]
        # A recorded step reads the learning rate on the device. AdamW with no decay is Adam.
        lr = torch.tensor(self.lr(0), device=self.device) if self.captures else self.lr(0)
        return torch.optim.AdamW(groups, lr=lr, fused=self.device.type in ("cpu", "cuda"), capturable=self.captures)

    # One step

    def train_step(self) -> None:
        """One step of training on the next batch."""
        if self.captures and self.captured is None:
            self.captured = record([self])
        step_together([self], None if self.captured is None else self.captured.replay)

    def _make_device_step(self) -> DeviceStep:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        scheduled = [(self.lr, rates), *((value, [tensor]) for value, tensor in self.loss.scheduled())]
        moving = [pair for pair in scheduled if not isinstance(pair[0], Constant)]
        device_step = DeviceStep(self.batches, moving, self._update, self.total_steps)
        device_step.at(self.step)
        return device_step

    def _state(self) -> Iterator[Tensor]:
        """Every tensor on the device that a step changes."""
        assert self.device_step is not None
        yield from self.loss.parameters()
        yield from self.loss.buffers()
        for entry in self.optimizer.state.values():
            yield from entry.values()
        yield from (self.loss_sum, self.device_step.step, *self.device_step.scheduled)

    def _set_schedules(self) -> None:
        self.loss.set_step(self.step)
        if self.device_step is not None:
            self.device_step.at(self.step + 1)
        if not isinstance(self.lr, Constant):
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.lr(self.step))
                else:
                    group["lr"] = self.lr(self.step)

    def _update(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.shared_loss or self.loss)(batch)
        loss.backward()
        self.optimizer.step()
        if self.shared_loss is not None:
            self.shared_loss.share_averages()
        self.loss_sum += loss.detach()

    # The run

    def train(self, run: Run) -> dict[str, Any]:
        """Run the remaining steps, evaluate on the test images, write everything into the run directory, return the summary.

        All processes evaluate the same weights with the same noise; the first one's clock decides when a checkpoint is due.

        Raises:
            Interrupted: `stop` was called; the run can be resumed.
            RunError: the loss is not finite; the last good checkpoint stays.
        """
        self.begin(run)
        while not self.done:
            self.train_step()
            self.after_step(run)
            if not self.done and self.stopping():
                self.save(run)
                raise Interrupted(
                    f"stopped at step {self.step} of {self.total_steps}, state saved; continue with: {self.world.command} train "
                    f"--resume {run.path}"
                )
        return self.end(run)

    def begin(self, run: Run) -> None:
        """What comes before the first step: the first checkpoint, the clock, and the pretraining.

        Raises:
            Interrupted: `stop` was called while it was pretrained.
        """
        if not self.world.from_first(run.checkpoint_file.exists):
            self.save(run)
        if self.world.is_first:
            registry.registry().manager.hook.dgrad_train_start(run=run.path, config=self.config)
        self.listener.started(self)
        self._started = time.perf_counter() - self.seconds
        if self.step == 0 and self.config.pretrain_steps:
            self._pretrain(run)

    def _pretrain(self, run: Run) -> None:
        """Steps on labelled images alone, every schedule at its first value. No checkpoint is written on the way: they are made in minutes."""
        assert isinstance(self.batches, SemiSupervisedBatches)
        labelled = self.batches.labelled
        count = min(self.config.batch_size, len(labelled.index))
        self._set_schedules()
        for step in range(self.config.pretrain_steps):
            self._update(labelled.draw(count))
            self.listener.pretrained(self, step + 1)
            if self._stop:
                raise Interrupted(
                    f"stopped in the pretraining, which will begin anew; continue with: {self.world.command} train --resume {run.path}"
                )
        self.loss_sum.zero_()

    def after_step(self, run: Run) -> None:
        """What comes after each step: at the end of an epoch, or of several, an evaluation and, when it is due, a checkpoint.

        Raises:
            RunError: the loss is not finite.
        """
        self.seconds = time.perf_counter() - self._started
        self.listener.stepped(self)
        if self.step % (self.config.eval_every * self.batches.steps_per_epoch) and not self.done:
            return
        metrics = self._evaluate(run)
        self.seconds = self.world.from_first(lambda: time.perf_counter() - self._started)
        if self.world.is_first:
            with run.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if self.seconds - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS or self.done:
            self.save(run)
        if self.world.is_first:
            registry.registry().manager.hook.dgrad_evaluation_end(run=run.path, metrics=metrics)
        self.listener.evaluated(self, metrics)

    def end(self, run: Run) -> dict[str, Any]:
        """What comes after the last step: the figures of the test images, which are returned and written as the summary."""
        summary = self._summarize()
        if self.world.is_first:
            write_text(run.summary_file, json.dumps(summary, indent=2) + "\n")
            registry.registry().manager.hook.dgrad_train_end(run=run.path, summary=summary)
        return summary

    def stopping(self) -> bool:
        """Whether to stop after this step: the same in all processes."""
        if self.world.size == 1:
            return self._stop
        return self.step % STEPS_BETWEEN_AGREEMENTS == 0 and self.world.any(self._stop)

    def stop(self) -> None:
        """Ask the run to save its state and stop after the current step; safe to call from a signal handler."""
        self._stop = True

    def _evaluate(self, run: Run) -> dict[str, Any]:
        train_loss = float(self.world.sum(self.loss_sum)) / self.world.size / self.losses_summed
        bound = evaluate_bound(
            self.model,
            self.data.valid,
            samples=1,
            generator=evaluation_generator(self.device, self.config.seed),
            refine_steps=self.config.steps_to_evaluate,
        )
        if not (math.isfinite(train_loss) and math.isfinite(bound.bound)):
            raise RunError(
                f"the loss is not finite (training {train_loss:g}, validation {bound.bound:g}) at step {self.step}; {run.path} keeps its last "
                "good checkpoint: train again with a lower --lr, or another epsilon or temperature"
            )
        self.loss_sum.zero_()
        self.losses_summed = 0
        metrics = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": train_loss,
            "valid_bound": bound.bound,
            "valid_reconstruction": bound.reconstruction,
            "valid_kl": bound.kl,
            **({} if bound.gaussian_kl is None else {"valid_gaussian_kl": bound.gaussian_kl}),
            **self._accuracies("valid"),
            "lr": self.lr(self.step - 1),
            **(
                {}
                if isinstance(self.loss.kl_schedule, Constant)
                else {"kl_weight": self.loss.kl_schedule(self.step - 1)}
            ),
            **{name: value(self.step - 1) for name, value in self.estimator.schedules.items()},
            "seconds": self.seconds,
        }
        criterion = self.config.criterion
        if not self.best_weights or merit(metrics, criterion) > merit(self.best, criterion):
            chosen_by = {"epoch", "step", "valid_bound", "valid_reconstruction"}
            self.best = {
                name: value for name, value in metrics.items() if name in chosen_by or name.startswith("valid_accuracy")
            }
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return metrics

    def _summarize(self) -> dict[str, Any]:
        last_weights = self.model.state_dict()
        final = {"epoch": self.epoch, "step": self.step, **self._test()}
        self.model.load_state_dict(self.best_weights)
        best = {**self.best, **self._test()}
        return {
            "test_bound": best["test_bound"],
            **({"accuracy": best["test_accuracy"]} if self.config.labels else {}),
            "unit": self.model.likelihood.unit,
            "best": best,
            "final": final,
            "estimator": self.config.estimator,
            "latent": self.config.latent,
            "dataset": self.config.dataset,
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": self.seconds,
            "processes": self.world.size,
            "device": describe_device(self.device),
            "versions": {
                "dgrad": dgrad.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "parameters": sum(tensor.numel() for tensor in last_weights.values()),
        }

    def _test(self) -> dict[str, float | None]:
        bound = self._test_bound(self.config.steps_to_evaluate)
        figures = {f"test_{name}": value for name, value in asdict(bound).items() if value is not None}
        if self.config.steps_to_evaluate:
            figures["test_encoder_bound"] = self._test_bound(0).bound
        figures |= self._accuracies("test")
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def _test_bound(self, refine_steps: int) -> Bound:
        return evaluate_bound(
            self.model,
            self.data.test,
            samples=self.config.eval_samples,
            generator=evaluation_generator(self.device, self.config.seed),
            refine_steps=refine_steps,
        )

    def _accuracies(self, split: str) -> dict[str, float]:
        if not self.config.labels:
            return {}
        accuracies = evaluate_accuracies(self.model, getattr(self.data, split), self.config.attributes)
        return {f"{split}_{name}": value for name, value in accuracies.items()}

    # State

    def save(self, run: Run) -> None:
        """Write the checkpoint; several processes do so together, and go on when the first has written it."""
        of_ranks = self.world.gather({"noise": self.noise.get_state(), "loss_sum": self.loss_sum.cpu()})
        if self.world.is_first:
            self._write(run, of_ranks)
        self._saved_at = self.world.from_first(lambda: self.seconds)

    def _write(self, run: Run, of_ranks: list[dict[str, Tensor]]) -> None:
        optimizer = self.optimizer.state_dict()["state"]
        tensors = {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"best.{name}": tensor for name, tensor in self.best_weights.items()},
            **{f"estimator.{name}": tensor for name, tensor in self.estimator.state_dict().items()},
            **{
                f"optimizer.{index}.{name}": tensor
                for index, entry in optimizer.items()
                for name, tensor in entry.items()
            },
            **self.loss.batch_losses.state_dict(),
            **{f"batches.{name}": tensor for name, tensor in self.batches.state_dict().items()},
            **{f"{_of_rank(rank)}{name}": tensor for rank, own in enumerate(of_ranks) for name, tensor in own.items()},
        }
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "losses_summed": self.losses_summed,
            "best": self.best if self.best_weights else None,
            "image_shape": self.model.image_shape,
            "config": _what_decides(self.config),
            "processes": self.world.size,
        }
        save_checkpoint(run.checkpoint_file, tensors, state)

    def restore(self, run: Run) -> None:
        """Go on from the run's checkpoint; metrics of later steps are dropped, they will be measured again.

        Raises:
            InputError: the checkpoint is missing, damaged, or does not fit the configuration.
        """
        if not run.checkpoint_file.exists() and not run.metrics():
            return  # killed before its first step: it starts anew
        tensors, state = load_checkpoint(run.checkpoint_file)
        ours, theirs = _what_decides(self.config), _as_written_now(state["config"])
        if ours != theirs:
            changed = sorted(name for name in ours if not isinstance(theirs, dict) or ours[name] != theirs.get(name))
            raise InputError(
                f"{run.config_file} was changed since the run began ({', '.join(changed)}); change it back, or start a new run"
            )
        processes = state.get("processes", 1)
        if processes != self.world.size:
            before = World(size=processes, local_size=processes).command
            raise InputError(
                f"{run.path} is a run of {processes} process(es), each with noise of its own; got {self.world.size}: continue it with "
                f"{before} train --resume {run.path}"
            )
        try:
            self._restore(run, tensors, state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise error if isinstance(error, InputError) else damaged(run.checkpoint_file, error) from None

    def _restore(self, run: Run, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        load_state(self.model, tensors, "model.", run.checkpoint_file)
        load_state(self.estimator, tensors, "estimator.", run.checkpoint_file)
        for name, loss in self.loss.batch_losses.items():
            load_state(loss, tensors, f"{name}.", run.checkpoint_file)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = tensor
        if state["step"] > 0 and not entries:
            raise ValueError("it lacks the optimizer's state")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        self.batches.load_state_dict(
            {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("batches.")}
        )
        self.noise.set_state(tensors[f"{_of_rank(self.world.rank)}noise"])
        self.loss_sum.copy_(tensors[f"{_of_rank(self.world.rank)}loss_sum"])
        self.step, self.seconds, self.losses_summed = state["step"], state["seconds"], state["losses_summed"]
        self.best = state["best"] or self.best
        self.best_weights = {
            name[5:]: tensor.to(self.device) for name, tensor in tensors.items() if name.startswith("best.")
        }
        self._saved_at = self.seconds
        kept = [line for line in run.metrics() if line["step"] <= self.step]
        if self.world.is_first:
            write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))


def _what_decides(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's figures, as JSON has them."""
    settings: dict[str, Any] = json.loads(config.to_json())
    del settings["device"]
    return settings


def _as_written_now(settings: Any) -> Any:
    """The settings of a checkpoint, which may be older than some of them; as they are where they are no settings."""
    try:
        return _what_decides(configure(settings))
    except (InputError, TypeError, AttributeError):
        return settings


def merit(figures: Mapping[str, Any], criterion: str) -> tuple[float, float]:
    """What the best weights have most of, by validation: accuracy and then the bound, or one of the others alone, which are to be low."""
    if criterion == "accuracy":
        return figures["valid_accuracy"], -figures["valid_bound"]
    return 0.0, -figures[f"valid_{criterion}"]


def _of_rank(rank: int) -> str:
    """What stands before the name of a tensor that each process has of its own; nothing for the first, as where it is alone."""
    return f"rank{rank}." if rank else ""


def step_together(trainers: Sequence[Trainer], replay: Callable[[], None] | None) -> None:
    """One step of each of several trainers whose next batches are of one size.

    Args:
        replay: does what `record` made of these trainers' steps, where the batches are whole; None where nothing was recorded.
    """
    indices = [trainer.batches.advance() for trainer in trainers]
    if replay is not None and len(indices[0]) == trainers[0].config.batch_size:
        replay()
    else:
        for trainer, index in zip(trainers, indices, strict=True):
            trainer._set_schedules()
            trainer._update(trainer.batches.gather(index))
    for trainer in trainers:
        trainer.losses_summed += 1
        trainer.step += 1


def record(trainers: Sequence[Trainer]) -> CapturedSteps | None:
    """The steps of the trainers as one CUDA graph; None, with a warning, where it cannot be made: then they go on without."""
    device_steps = []
    for trainer in trainers:
        trainer.device_step = trainer._make_device_step()
        device_steps.append(trainer.device_step)
    generators = [each for trainer in trainers for each in (trainer.noise, *trainer.batches.generators)]
    try:
        return CapturedSteps(
            device_steps, lambda: (tensor for trainer in trainers for tensor in trainer._state()), generators
        )
    except NotCapturable as error:
        for trainer in trainers:
            trainer.captures, trainer.device_step = False, None
        warnings.warn(
            f"the training step could not be recorded as a CUDA graph ({error}): training goes on without, more slowly; say "
            "--compile off, or ask the estimator's author",
            CompilerWarning,
            stacklevel=2,
        )
        return None


def resume(
    path: Path,
    listener: Listener | None = None,
    world: World | None = None,
    data: TrainingData | None = None,
    **changes: Any,
) -> tuple[Trainer, Run]:
    """A trainer at the last checkpoint of an existing run.

    Args:
        data: as of `Trainer`.
        changes: settings that may differ without changing the result, such as the device.

    Raises:
        InputError: there is no such run, or its files are damaged.
    """
    run = Run.open(path)
    trainer = Trainer(replace(run.config, **changes), listener, world, data)
    trainer.restore(run)
    return trainer, run
