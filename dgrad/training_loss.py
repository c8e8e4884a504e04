"""What a training step minimises, as one module: from a batch to a number. May import torch, the models, objectives and the registry."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.data import Batch
from dgrad.gradient_estimator import GradientEstimator
from dgrad.networks import DiscreteVAE
from dgrad.noise import drop
from dgrad.objectives import KLObjective, as_objective
from dgrad.schedules import Constant, Schedule, schedule
from dgrad.supervision import ObservedObjective, Supervision, known_codes


class TrainingLoss(nn.Module):
    """The negative bound of a batch, in nats an image, as the estimator estimates it and its gradient.

    It holds every parameter that training moves: the model's and the estimator's own.
    """

    kl_weight: Tensor

    def __init__(self, model: DiscreteVAE, estimator: GradientEstimator, config: TrainConfig, noise: Generator) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator
        self.config = config
        self.noise = noise
        self.kl_schedule = schedule(config.kl_weight)
        self.kl_trained = self.kl_schedule != Constant(0.0)
        # On the device, where a captured step sees it change.
        self.register_buffer("kl_weight", torch.tensor(self.kl_schedule.over(1)(0)), persistent=False)
        self.supervision = Supervision(config, model.layer) if config.labels else None
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
        posterior = self.model.posterior(drop(batch.images, config.input_dropout, generator=self.noise))
        logits = posterior.logits  # [B, *code]
        objective = self.model.reconstruction(batch.images, posterior.draw(generator=self.noise))
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
        estimate = self.estimator(layer, logits, objective, generator=self.noise)
        loss = estimate.loss.mean()
        if config.kl == "outside" and self.kl_trained:
            loss = loss + self.kl_weight * layer.kl(kl_logits).mean()
        if posterior.gaussian is not None:
            loss = loss + posterior.gaussian.kl().mean()
        if self.supervision is not None:
            loss = loss + self.supervision(logits, known, labelled)
        return loss
