"""What a training step minimises, as one module: from a batch to a number. May import torch, the models, objectives and the registry."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.data import Batch
from dgrad.distributed import World
from dgrad.gradient_estimator import GradientEstimator
from dgrad.networks import DiscreteVAE
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
        logits = self.model.encoder(self._drop_input(batch.images))  # [B, *code]
        objective = self.model.reconstruction(batch.images)
        if config.kl == "inside" and config.kl_weight > 0:
            objective = objective + config.kl_weight * KLObjective(layer, logits)
        if self.has_code_losses:
            for code_loss in registry.code_losses(batch, config):
                objective = objective + FunctionObjective(code_loss)
        estimate = self.estimator(layer, logits, objective, generator=self.noise)
        loss = estimate.loss.mean()
        if config.kl == "outside" and config.kl_weight > 0:
            loss = loss + config.kl_weight * layer.kl(logits).mean()
        return loss

    def _drop_input(self, images: Tensor) -> Tensor:
        rate = self.config.input_dropout
        if rate == 0:
            return images
        kept = torch.empty_like(images).bernoulli_(1 - rate, generator=self.noise)
        return images * kept / (1 - rate)


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
