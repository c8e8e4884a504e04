"""Learning from few labels: losses, and labels for more images, through the hooks that any plugin has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import dgrad
from dgrad.config import TrainConfig
from dgrad.core.objectives import CodeLoss
from dgrad.data import Batch, unit
from dgrad.errors import InputError
from dgrad.training.labels import LabelObjective
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.labels._adversarial import AdversarialLoss
from dgrad_plugins.labels._spreading import spread_labels
from dgrad_plugins.labels._supervision import Supervision, label_frequencies


@dgrad.hookimpl
def dgrad_label_images(
    images: Tensor, index: Tensor, labels: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor] | None:
    """`--propagate-labels`: the images whose neighbours' labels are the clearest."""
    if not config.propagate_labels:
        return None
    if labels.ndim > 1:
        raise InputError(f"--propagate-labels {config.propagate_labels:g} is for classes; got attributes, leave it out")
    return spread_labels(unit(images), index, labels, config.propagate_labels)


@dgrad.hookimpl
@dgrad.recordable
def dgrad_code_losses(batch: Batch, config: TrainConfig) -> CodeLoss | None:
    """`--label-loss code`: a cost for every known variable of the code that is not its label."""
    if config.labels == 0 or config.label_loss != "code" or batch.labels is None:
        return None
    return LabelObjective(config.label_weight, batch.labels)


@dgrad.hookimpl
def dgrad_batch_losses(
    model: DiscreteVAE, labels: Tensor | None, config: TrainConfig
) -> Mapping[str, nn.Module] | None:
    """The cross-entropy of the labels, class balance and independence; `--adversarial-weight`."""
    if labels is None:
        return None
    frequencies = label_frequencies(labels.cpu(), model.layer.shape[-1]) if labels.ndim > 1 else None
    losses: dict[str, nn.Module] = {"supervision": Supervision(config, model.layer, frequencies, model.gaussian)}
    if config.adversarial_weight > 0:
        losses["adversarial"] = AdversarialLoss(config.adversarial_weight, config.adversarial_radius)
    return losses
