"""The loss of a training step as one module: from a batch to a number."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.kl_objective import KLObjective
from dgrad.core.objectives import as_objective
from dgrad.core.random import drop, seed_for
from dgrad.core.refinement import check_refinable, refine
from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.data import Batch
from dgrad.errors import InputError
from dgrad.training.labels import ObservedObjective, known_codes
from dgrad.training.processes import ProcessGroup
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.posterior import EncodedBatch, Posterior

CHECKPOINT_PARTS = ("model", "best", "estimator", "optimizer", "batches")
"""Names that begin a checkpoint's tensors; those of a plugin's loss begin with the loss's name."""


@contextmanager
def frozen(network: nn.Module, freeze: bool) -> Iterator[None]:
    """Freeze the parameters of a network: evaluations inside give them no gradient.

    With `freeze` false, nothing is frozen.
    """
    parameters = [parameter for parameter in network.parameters() if freeze and parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def batch_losses(model: DiscreteVAE, labels: Tensor | None, config: TrainConfig) -> nn.ModuleDict:
    """The losses that the plugins' `dgrad_batch_losses` hooks add to a run, by name.

    Their initial weights follow from the run's seed, and leave torch's own generator alone.

    Raises:
        InputError: a hook gives something else than modules by name, or a name that is taken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("losses of plugins", config.seed))
        hook = registry.registry().manager.hook.dgrad_batch_losses
        given = hook(model=model, labels=labels, config=config)
    losses: dict[str, nn.Module] = {}
    for named in given:
        if not isinstance(named, Mapping) or not all(isinstance(loss, nn.Module) for loss in named.values()):
            raise InputError(
                f"dgrad_batch_losses gives {type(named).__name__}; expected torch modules by name, or None"
            )
        for name, loss in named.items():
            if not name.isidentifier() or name in CHECKPOINT_PARTS or name in losses:
                taken = ", ".join((*CHECKPOINT_PARTS, *losses))
                raise InputError(f"dgrad_batch_losses names a loss {name!r}; expected an identifier other than {taken}")
            losses[name] = loss
    return nn.ModuleDict(losses)


class TrainingLoss(nn.Module):
    """The negative bound of a batch, in nats an image, as the estimator estimates it and its gradient.

    It holds every parameter that training moves: of the model, the estimator and the plugins' losses.

    Args:
        labels: of the images that show them; None for a run without labels.

    Raises:
        InputError: a plugin's losses cannot be.
    """

    kl_weight: Tensor

    def __init__(
        self,
        model: DiscreteVAE,
        estimator: GradientEstimator,
        config: TrainConfig,
        noise: Generator,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator
        self.config = config
        self.noise = noise
        assert config.kl_weight is not None  # chosen by Build
        self.kl_schedule = schedule(config.kl_weight)
        self.kl_trained = self.kl_schedule != Constant(0.0)
        # On the device, where a captured step sees it change.
        self.register_buffer("kl_weight", torch.tensor(self.kl_schedule.over(1)(0)), persistent=False)
        if config.refine_steps or config.steps_to_evaluate:
            check_refinable(model.layer)
        self.batch_losses = batch_losses(model, labels, config)
        self.code_losses = registry.registry().manager.hook.dgrad_code_losses.get_hookimpls()

    def set_run_length(self, steps: int) -> None:
        """Tell schedules that span the whole run how many steps it has."""
        self.estimator.set_run_length(steps)
        self.kl_schedule = self.kl_schedule.over(steps)

    def scheduled(self) -> list[tuple[Schedule, Tensor]]:
        """Every schedule with the tensor that holds its value."""
        of_estimator = [(value, getattr(self.estimator, name)) for name, value in self.estimator.schedules.items()]
        return [(self.kl_schedule, self.kl_weight), *of_estimator]

    @property
    def cuda_graph_safe(self) -> bool:
        """Whether a step may be recorded once and replayed: no Python code decides anything at each step."""
        own_steps = type(self.estimator).set_step is not GradientEstimator.set_step
        of_plugins = [*(hook.function for hook in self.code_losses), *self.batch_losses.values()]
        return not own_steps and all(getattr(part, "recordable", False) for part in of_plugins)

    def set_step(self, step: int) -> None:
        """Set what is scheduled to its value at `step`, without waiting for the device."""
        self.estimator.set_step(step)
        if not isinstance(self.kl_schedule, Constant):
            self.kl_weight.fill_(self.kl_schedule(step))

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        config, layer = self.config, self.model.layer
        seen = drop(batch.images, config.input_dropout, generator=self.noise)
        posterior = self.model.posterior(seen)
        logits = posterior.logits  # [B, *code]
        gaussian = posterior.draw(generator=self.noise)
        objective = self.model.reconstruction(batch.images, gaussian)
        kl_logits, known, labelled = logits, None, None
        if config.labels:
            assert batch.labels is not None
            known, labelled = known_codes(batch.labels, layer.shape, logits.dtype)
            objective = ObservedObjective(objective, known, labelled)
            kl_logits = logits.masked_fill(known, 0.0)  # where the code is known there is no q: as if it were the prior
        if config.kl == "inside" and self.kl_trained:
            objective = objective + self.kl_weight * KLObjective(layer, kl_logits)
        if self.code_losses:
            for code_loss in registry.code_losses(batch, config):
                objective = objective + as_objective(code_loss)
        with frozen(self.model.decoder, config.refine_steps > 0):
            estimate = self.estimator(layer, logits, objective, generator=self.noise)
        loss = estimate.loss.mean()
        if config.kl == "outside" and self.kl_trained:
            loss = loss + self.kl_weight * layer.kl(kl_logits).mean()
        if posterior.gaussian is not None:
            loss = loss + posterior.gaussian.kl().mean()
        if self.batch_losses:
            encoded = EncodedBatch(batch, seen, posterior, known, labelled, self.model.posterior, self.noise)
            for batch_loss in self.batch_losses.values():
                loss = loss + batch_loss(encoded)
        if config.refine_steps:  # so far the encoder's gradient, whose q is not the one that the decoder learns from
            return loss - loss.detach() + self._refined_bound(batch.images, posterior, gaussian)
        return loss

    def _refined_bound(self, images: Tensor, posterior: Posterior, gaussian: Tensor | None) -> Float[Tensor, ""]:
        """The bound of the refined q, a function of the decoder alone."""
        layer, gaussian = self.model.layer, None if gaussian is None else gaussian.detach()
        objective = self.model.reconstruction(images, gaussian)
        logits = refine(layer, posterior.logits, objective, self.config.refine_steps, generator=self.noise)
        bound = objective(layer.sample(logits, generator=self.noise)).squeeze(0) + layer.kl(logits)
        if posterior.gaussian is not None:
            bound = bound + posterior.gaussian.kl().detach()
        return bound.mean()


def _buffers_apart() -> dict[str, Any]:
    """Tells DistributedDataParallel to leave buffers alone, by the name that this version of torch has for it."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


class DataParallelLoss(nn.Module):
    """One process's part of a batch's loss: the mean over the processes is the whole batch's, and so is the gradient's.

    DistributedDataParallel averages the gradient in the backward pass. `share_averages` averages the buffers, such as
    a baseline or a coefficient. Every parameter must have a gradient in every step.
    """

    def __init__(self, loss: TrainingLoss, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.share = 1.0
        self.part = DistributedDataParallel(_Rehearsed(loss), gradient_as_bucket_view=True, **_buffers_apart())
        # DistributedDataParallel rearranges the gradients after the first backward pass, and so the order of their sum
        # over more than two processes. After this one, a resumed run adds in the order of an undisturbed one.
        self.part(None).backward()
        self.zero_grad()
        self.averages = [
            name
            for name, tensor in self.part.module.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        ]

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        self.share = batch.share
        return self.part(batch) * (batch.share * self.group.size)

    @torch.no_grad()
    def share_averages(self) -> None:
        """Average the saved buffers over the processes, weighted by the shares of the last batch.

        A moving average is linear in the batch's mean. So it is then what one process with the whole batch would have.
        """
        for name in self.averages:
            average = self.part.module.get_buffer(name)
            average.copy_(self.group.sum(average * self.share))


class _Rehearsed(nn.Module):
    """A loss of a batch; without a batch, a number whose gradient is zero in every parameter."""

    def __init__(self, loss: TrainingLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: Batch | None) -> Float[Tensor, ""]:
        if batch is None:
            return 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
        return self.loss(batch)
