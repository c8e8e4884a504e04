"""What a training step minimises, as one module: from a batch to a number. May import torch, the models, objectives and the registry."""

from __future__ import annotations

from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.data import Batch
from dgrad.gradient_estimator import GradientEstimator
from dgrad.networks import DiscreteVAE
from dgrad.noise import drop
from dgrad.objectives import FunctionObjective, KLObjective


class TrainingLoss(nn.Module):
    """The negative bound of a batch, in nats an image, as the estimator estimates it and its gradient.

    It holds every parameter that training moves: the model's and the estimator's own.
    """

    def __init__(self, model: DiscreteVAE, estimator: GradientEstimator, config: TrainConfig, noise: Generator) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator
        self.config = config
        self.noise = noise
        self.has_code_losses = bool(registry.registry().manager.hook.dgrad_code_losses.get_hookimpls())

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        config, layer = self.config, self.model.layer
        posterior = self.model.posterior(drop(batch.images, config.input_dropout, generator=self.noise))
        logits = posterior.logits  # [B, *code]
        objective = self.model.reconstruction(batch.images, posterior.draw(generator=self.noise))
        if config.kl == "inside" and config.kl_weight > 0:
            objective = objective + config.kl_weight * KLObjective(layer, logits)
        if self.has_code_losses:
            for code_loss in registry.code_losses(batch, config):
                objective = objective + FunctionObjective(code_loss)
        estimate = self.estimator(layer, logits, objective, generator=self.noise)
        loss = estimate.loss.mean()
        if config.kl == "outside" and config.kl_weight > 0:
            loss = loss + config.kl_weight * layer.kl(logits).mean()
        if posterior.gaussian is not None:
            loss = loss + posterior.gaussian.kl().mean()
        return loss
