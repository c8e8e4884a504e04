"""What a training step minimises, as one module: from a batch to a number. May import torch, the models, objectives and the registry."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import KLObjective, as_objective
from dgrad.core.random import drop
from dgrad.core.refinement import check_refinable, refine
from dgrad.core.schedules import Constant, Schedule, schedule
from dgrad.data import Batch
from dgrad.training.labels import ObservedObjective, Supervision, adversarial_change, known_codes
from dgrad.training.processes import World
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.posterior import Posterior


@contextmanager
def frozen(network: nn.Module, freeze: bool) -> Iterator[None]:
    """A network whose parameters get no gradient from what is evaluated inside; if `freeze` is false, the network as it is."""
    parameters = [parameter for parameter in network.parameters() if freeze and parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class TrainingLoss(nn.Module):
    """The negative bound of a batch, in nats an image, as the estimator estimates it and its gradient.

    It holds every parameter that training moves: the model's and the estimator's own. `frequencies` are those of `Supervision`.
    """

    kl_weight: Tensor

    def __init__(
        self,
        model: DiscreteVAE,
        estimator: GradientEstimator,
        config: TrainConfig,
        noise: Generator,
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator
        self.config = config
        self.noise = noise
        self.kl_schedule = schedule(config.kl_weight)
        self.kl_trained = self.kl_schedule != Constant(0.0)
        # On the device, where a captured step sees it change.
        self.register_buffer("kl_weight", torch.tensor(self.kl_schedule.over(1)(0)), persistent=False)
        if config.refine_steps or config.steps_to_evaluate:
            check_refinable(model.layer)
        self.supervision = Supervision(config, model.layer, frequencies, model.gaussian) if config.labels else None
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
    def recordable(self) -> bool:
        """Whether a step may be recorded once and replayed: nothing in it is decided by Python code that runs at each step."""
        own_steps = type(self.estimator).set_step is not GradientEstimator.set_step
        return not own_steps and all(getattr(each.function, "recordable", False) for each in self.code_losses)

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
        kl_logits = logits
        if self.supervision is not None:
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
        if self.supervision is not None:
            loss = loss + self.supervision(logits, known, labelled, posterior.mean)
            if config.adversarial_weight > 0:
                radius = config.adversarial_radius
                change = adversarial_change(self._logits, seen, logits, radius, generator=self.noise)
                loss = loss + config.adversarial_weight * change
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

    def _logits(self, images: Tensor) -> Tensor:
        return self.model.posterior(images).logits


def _buffers_apart() -> dict[str, Any]:
    """Tells DistributedDataParallel to leave buffers alone, by the name that this torch has for it; the older one is deprecated."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


class SharedLoss(nn.Module):
    """One process's part of the loss of a batch: its mean over the processes, and that of its gradient, are the whole batch's.

    The gradient is averaged in the backward pass, by DistributedDataParallel; what is averaged over a batch outside the gradient (a
    baseline, a coefficient) by `share_averages`. Every parameter must have a gradient in every step.
    """

    def __init__(self, loss: TrainingLoss, world: World) -> None:
        super().__init__()
        self.world = world
        self.share = 1.0
        self.part = DistributedDataParallel(_Rehearsed(loss), gradient_as_bucket_view=True, **_buffers_apart())
        # DistributedDataParallel arranges the gradients anew after the first backward pass, and with that the order in which those of
        # more than two processes are added. It is behind us here: a resumed run adds in the order of one that nobody disturbed.
        self.part(None).backward()
        self.zero_grad()
        self.averages = [
            name
            for name, tensor in self.part.module.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        ]

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        self.share = batch.share
        return self.part(batch) * (batch.share * self.world.size)

    @torch.no_grad()
    def share_averages(self) -> None:
        """After each step: the buffers that are saved become their mean over the processes, weighted by the shares of the last batch.

        What is linear in the mean over a batch, as moving averages are, is then what one process that saw the whole batch would have.
        """
        for name in self.averages:
            average = self.part.module.get_buffer(name)
            average.copy_(self.world.sum(average * self.share))


class _Rehearsed(nn.Module):
    """A loss of a batch; without a batch, a number whose gradient is zero in every parameter."""

    def __init__(self, loss: TrainingLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: Batch | None) -> Float[Tensor, ""]:
        if batch is None:
            return 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
        return self.loss(batch)
