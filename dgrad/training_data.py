"""The batches that a training run draws from, as its configuration says. May import torch, dgrad.config, dgrad.data and dgrad.supervision."""

from __future__ import annotations

import torch
from torch import Generator

from dgrad.config import TrainConfig
from dgrad.data import (
    Batches,
    Dataset,
    LabelledImages,
    SemiSupervisedBatches,
    Split,
    binarize,
    choose_labelled,
    choose_labelled_attributes,
)
from dgrad.distributed import World
from dgrad.errors import InputError
from dgrad.latent_layer import LatentLayer
from dgrad.supervision import check_labels

BINARIZE_WHEN_DRAWN = {"threshold": "threshold", "static": "draw", "dynamic": "draw", "none": "none"}
"""What becomes of the pixels of an image that was redrawn; one that was not is binarised already, unless that is dynamic."""


def training_batches(
    config: TrainConfig, dataset: Dataset, layer: LatentLayer, device: torch.device, world: World
) -> Batches | SemiSupervisedBatches:
    """Batches of the training split, on the device; with `labels`, all of its images unlabelled and the labelled ones beside them.

    Raises:
        InputError: the data set, the latent and the number of labels do not go together.
    """
    if config.labels:
        check_labels(config, dataset, layer)
        if world.size > 1:
            raise InputError(f"--labels {config.labels} trains in one process; got {world.size}: leave torchrun out")
    binary = binarize(dataset, config.binarize, seed=config.seed).train
    dynamic = config.binarize == "dynamic"
    generator = Generator(device).manual_seed(config.seed)
    batches = Batches(
        binary.to(device), config.batch_size, generator=generator, dynamic=dynamic, rank=world.rank, ranks=world.size
    )
    if not config.labels:
        return batches
    assert dataset.train.labels is not None
    choose = choose_labelled_attributes if dataset.attributes else choose_labelled
    index = choose(dataset.train.labels, config.labels, seed=config.seed)
    source = dataset.train if config.augment else binary
    labelled = LabelledImages(
        Split(source.images[index], dataset.train.labels[index]).to(device),
        index.to(device),
        generator=Generator(device).manual_seed(config.seed + 2**42),
        binarize=BINARIZE_WHEN_DRAWN[config.binarize if config.augment or dynamic else "none"],
        augment=config.augment,
    )
    return SemiSupervisedBatches(batches, labelled, config.labelled_batch)
