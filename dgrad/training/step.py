"""One step of training: its loss, optimizer and schedules, and on CUDA the graph that replays it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from dgrad.config import TrainConfig
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.schedules import Constant, schedule
from dgrad.data import Batch, Batches, SemiSupervisedBatches
from dgrad.errors import CompilerWarning
from dgrad.kernels import cpu
from dgrad.kernels.denormals import flush_denormals
from dgrad.training.cuda_graph import CudaGraphError, CudaGraphSteps, DeviceStep
from dgrad.training.loss import DataParallelLoss, TrainingLoss
from dgrad.training.processes import ProcessGroup
from dgrad.vae.model import DiscreteVAE

STEPS_WORTH_COMPILING = 500
"""With `--compile auto`: about as many steps as win back the second or two that compiling takes. Nothing else decides,
so that a configuration gives the same figures the first time and later."""


class TrainingStep:
    """The steps of one run. Nothing in a step waits for the device.

    The training noise has a generator of its own. The order of the data and evaluation have others.

    Attributes:
        number: how many steps are made.
        total: how many steps the run has.
        compiled: whether compiled kernels may be used.
        noise: the generator of the training noise: input dropout and the estimator.
        loss_sum: the sum of the losses since it was last read, on the device.
        losses_summed: how many losses are in it.
        uses_cuda_graph: whether the step is to be recorded as a CUDA graph.
        device_step: the step as it was recorded, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: DiscreteVAE,
        estimator: GradientEstimator,
        batches: Batches | SemiSupervisedBatches,
        group: ProcessGroup,
    ) -> None:
        self.batches = batches
        self.group = group
        device = batches.order.device
        self.noise = Generator(device).manual_seed(group.noise_seed(config.seed))
        model.set_generator(self.noise)
        self.total = config.steps if config.steps is not None else config.epochs * batches.steps_per_epoch
        self.compiled = config.compile == "on" or (config.compile == "auto" and self.total >= STEPS_WORTH_COMPILING)
        model.compiled_kernels = self.compiled
        model.sweep_dtype = getattr(torch, config.sweep_precision)
        assert config.lr is not None  # chosen by Build
        self.lr = schedule(config.lr).over(self.total)
        labels = batches.labelled.labels if isinstance(batches, SemiSupervisedBatches) else None
        self.loss = TrainingLoss(model, estimator, config, self.noise, labels).to(device)
        self.loss.set_run_length(self.total)
        alone = group.size == 1
        self.uses_cuda_graph = alone and device.type == "cuda" and self.compiled and self.loss.cuda_graph_safe
        self.optimizer = self._make_optimizer(config.weight_decay)
        self.data_parallel_loss = None if alone else DataParallelLoss(self.loss, group)
        self.number = 0
        self.loss_sum = torch.zeros((), device=device)
        self.losses_summed = 0
        self.device_step: DeviceStep | None = None

    @property
    def labelled_images(self) -> int:
        """How many images count as labelled: `labels` and those that these were spread to."""
        return len(self.batches.labelled.index) if isinstance(self.batches, SemiSupervisedBatches) else 0

    @property
    def epoch(self) -> float:
        """How many epochs are done; a fraction in the middle of one."""
        return self.number / self.batches.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.number >= self.total

    def update(self, batch: Batch) -> None:
        """Change the parameters by the gradient of a batch."""
        device = self.batches.order.device
        with flush_denormals(device, compiled=self.compiled), cpu.compiled_rows(self.compiled):
            self.optimizer.zero_grad(set_to_none=True)
            loss = (self.data_parallel_loss or self.loss)(batch)
            loss.backward()
            self.optimizer.step()
        if self.data_parallel_loss is not None:
            self.data_parallel_loss.share_averages()
        self.loss_sum += loss.detach()

    def pretrain(self, steps: int) -> Iterator[int]:
        """Before the first step: steps on labelled images alone, each schedule at its first value; counts them.

        They take minutes and are not saved.
        """
        if self.number or not steps:
            return
        assert isinstance(self.batches, SemiSupervisedBatches)
        labelled = self.batches.labelled
        count = min(self.batches.batch_size, len(labelled.index))
        self.set_schedules()
        for step in range(steps):
            self.update(labelled.draw(count))
            yield step + 1
        self.forget_losses()

    def set_schedules(self) -> None:
        """Give everything scheduled its value at this step."""
        self.loss.set_step(self.number)
        if self.device_step is not None:
            self.device_step.at(self.number + 1)
        if not isinstance(self.lr, Constant):
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.lr(self.number))
                else:
                    group["lr"] = self.lr(self.number)

    def scheduled_values(self) -> dict[str, float]:
        """The values of the last step: learning rate, KL weight where it moves, and the estimator's schedules."""
        last, kl_weight = self.number - 1, self.loss.kl_schedule
        return {
            "lr": self.lr(last),
            **({} if isinstance(kl_weight, Constant) else {"kl_weight": kl_weight(last)}),
            **{name: value(last) for name, value in self.loss.estimator.schedules.items()},
        }

    def mean_loss(self) -> float:
        """The mean of the losses in the sum, over all processes."""
        return float(self.group.sum(self.loss_sum)) / self.group.size / self.losses_summed

    def forget_losses(self) -> None:
        """Begin the sum of the losses anew."""
        self.loss_sum.zero_()
        self.losses_summed = 0

    def make_device_step(self) -> DeviceStep:
        """The step as a function that reads everything on the device, from the next step on."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        scheduled = [(self.lr, rates), *((value, [tensor]) for value, tensor in self.loss.scheduled())]
        moving = [pair for pair in scheduled if not isinstance(pair[0], Constant)]
        self.device_step = DeviceStep(self.batches, moving, self.update, self.total)
        self.device_step.at(self.number)
        return self.device_step

    def changed_tensors(self) -> Iterator[Tensor]:
        """Every tensor on the device that a recorded step changes."""
        assert self.device_step is not None
        yield from self.loss.parameters()
        yield from self.loss.buffers()
        for entry in self.optimizer.state.values():
            yield from entry.values()
        yield from (self.loss_sum, self.device_step.step, *self.device_step.scheduled)

    def _make_optimizer(self, weight_decay: float) -> torch.optim.AdamW:
        model, estimator = self.loss.model, self.loss.estimator
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        others += [*estimator.parameters(), *self.loss.batch_losses.parameters()]
        if weight_decay:
            groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        else:  # one group of the same order: each group costs a step's time
            groups = [{"params": decayed + others, "weight_decay": 0.0}]
        # A recorded step reads the learning rate on the device. AdamW with no decay is Adam.
        device, recorded = self.batches.order.device, self.uses_cuda_graph
        lr = torch.tensor(self.lr(0), device=device) if recorded else self.lr(0)
        return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"), capturable=recorded)


class Lockstep:
    """Runs of one configuration that make their steps together; a run that is behind the others catches up first.

    On CUDA the steps of all are recorded as branches of one graph.
    """

    def __init__(self, steps: Sequence[TrainingStep]) -> None:
        self.running = list(steps)
        self.cuda_graph: CudaGraphSteps | None = None

    def advance(self) -> list[TrainingStep]:
        """One step of each run that has made the fewest; those runs."""
        least = min(step.number for step in self.running)
        behind = [step for step in self.running if step.number == least]
        replay = self._replay() if len(behind) == len(self.running) else None
        indices = [step.batches.advance() for step in behind]
        if replay is not None and len(indices[0]) == behind[0].batches.batch_size:
            replay()
        else:
            for step, index in zip(behind, indices, strict=True):
                step.set_schedules()
                step.update(step.batches.gather(index))
        for step in behind:
            step.losses_summed += 1
            step.number += 1
        return behind

    def leave_out(self, step: TrainingStep) -> None:
        """Go on without a run; the others are recorded anew."""
        self.running.remove(step)
        self.cuda_graph = None

    def _replay(self) -> Callable[[], None] | None:
        if self.cuda_graph is None and all(step.uses_cuda_graph for step in self.running):
            self.cuda_graph = _record(self.running)
        return None if self.cuda_graph is None else self.cuda_graph.replay


def _record(steps: Sequence[TrainingStep]) -> CudaGraphSteps | None:
    """The steps as one CUDA graph; None, with a warning, where it cannot be made: then they go on without."""
    device_steps = [step.make_device_step() for step in steps]
    generators = [generator for step in steps for generator in (step.noise, *step.batches.generators)]
    try:
        return CudaGraphSteps(
            device_steps, lambda: (tensor for step in steps for tensor in step.changed_tensors()), generators
        )
    except CudaGraphError as error:
        for step in steps:
            step.uses_cuda_graph, step.device_step = False, None
        warnings.warn(
            f"the training step could not be recorded as a CUDA graph ({error}): training goes on without, "
            "more slowly; say --compile off, or ask the estimator's author",
            CompilerWarning,
            stacklevel=2,
        )
        return None
