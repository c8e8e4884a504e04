"""The images of a training run and the batches that it draws, as its configuration says."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.random import seed_for
from dgrad.data import (
    Batches,
    Dataset,
    LabelledImages,
    SemiSupervisedBatches,
    Split,
    choose_labelled,
    choose_labelled_attributes,
)
from dgrad.errors import InputError
from dgrad.training.build import build_dataset, evaluation_data
from dgrad.training.labels import check_labels
from dgrad.training.processes import World

BINARIZE_WHEN_DRAWN = {"threshold": "threshold", "static": "draw", "dynamic": "draw", "none": "none"}
"""How redrawn images are binarised. The others already are, unless that is dynamic."""

SEEDLESS = ("threshold", "none")
"""The binarisations that give every seed the same pixels."""


class TrainingData:
    """The images of a run, once on its device.

    Attributes:
        dataset: as it was loaded, on the CPU.
        train: the images that are trained on, on the device; grey where they are binarised when they are drawn.
        valid: the validation images as they are evaluated, on the device.
        test: the test images as they are evaluated, on the device.

    Raises:
        InputError: there is no such data set, or it is damaged.
        RunError: it could not be downloaded.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, like: TrainingData | None = None) -> None:
        self.dataset: Dataset = build_dataset(config) if like is None else like.dataset
        binary = evaluation_data(config, self.dataset)
        if config.binarize != "dynamic":
            self.train = binary.train.to(device)
        else:
            self.train = self.dataset.train.to(device) if like is None else like.train
        self.valid = binary.valid.to(device)
        self.test = binary.test.to(device)

    def with_seed_of(self, config: TrainConfig) -> TrainingData:
        """The images of a run that differs in its seed at most; shared where the seed does not decide them."""
        return self if config.binarize in SEEDLESS else TrainingData(config, self.train.images.device, like=self)


def training_batches(
    config: TrainConfig, data: TrainingData, layer: LatentLayer, world: World
) -> Batches | SemiSupervisedBatches:
    """Batches of the training split, on the device; with `labels`, labelled images beside unlabelled ones.

    Raises:
        InputError: the data set, the latent and the number of labels do not go together.
    """
    if config.labels:
        check_labels(config, data.dataset, layer)
        if world.size > 1:
            raise InputError(f"--labels {config.labels} trains in one process; got {world.size}: leave torchrun out")
    device = data.train.images.device
    dynamic = config.binarize == "dynamic"
    generator = Generator(device).manual_seed(seed_for("order of the data", config.seed))
    batches = Batches(
        data.train, config.batch_size, generator=generator, dynamic=dynamic, rank=world.rank, ranks=world.size
    )
    if not config.labels:
        return batches
    labels = data.dataset.train.labels
    assert labels is not None
    choose = choose_labelled_attributes if data.dataset.attributes else choose_labelled
    index = choose(labels, config.labels, seed=config.seed)
    known = labels[index].to(device)
    index, labels = label_images(data.train.images, index.to(device), known, config, layer.shape[-1])
    source = data.dataset.train if config.augment else data.train
    labelled = LabelledImages(
        Split(source.images[index.to(source.images.device)].to(device), labels),
        index,
        generator=Generator(device).manual_seed(seed_for("labelled images", config.seed)),
        binarize=BINARIZE_WHEN_DRAWN[config.binarize if config.augment or dynamic else "none"],
        augment=config.augment,
    )
    return SemiSupervisedBatches(batches, labelled, config.labelled_batch)


def label_images(
    images: Tensor, index: Tensor, labels: Tensor, config: TrainConfig, values: int
) -> tuple[Tensor, Tensor]:
    """The places and labels of labelled images, as a plugin's `dgrad_label_images` hook leaves them.

    Raises:
        InputError: the hook gives other shapes, places outside the images, or labels outside the `values`.
    """
    hook = registry.registry().manager.hook.dgrad_label_images
    places, theirs = hook(images=images, index=index, labels=labels, config=config) or (index, labels)
    fits = places.ndim == 1 and len(places) > 0 and theirs.shape == (len(places), *labels.shape[1:])
    inside = fits and places.min() >= 0 and places.max() < len(images) and theirs.min() >= -1 and theirs.max() < values
    if not inside:
        shape = ", ".join(["M", *map(str, labels.shape[1:])])
        raise InputError(
            f"dgrad_label_images gives places {list(places.shape)} and labels {list(theirs.shape)}; expected [M] "
            f"places from 0 to {len(images) - 1} and [{shape}] labels from -1 to {values - 1}: ask the plugin's author"
        )
    return places, theirs
