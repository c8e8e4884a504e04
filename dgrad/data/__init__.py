"""Data sets held in memory: what they are, where they come from, how a training step draws from them.

A new source of data is a function `load(data_root: Path) -> Dataset`; `load_dataset` finds it by its registered name.
"""

from dgrad.data.batches import Batch, Batches
from dgrad.data.binarization import BINARIZATIONS, binarize
from dgrad.data.download import download_idx
from dgrad.data.idx import load_idx
from dgrad.data.image_folder import load_folder
from dgrad.data.labelled import (
    UNKNOWN,
    LabelledImages,
    SemiSupervisedBatches,
    choose_labelled,
    choose_labelled_attributes,
)
from dgrad.data.npz import load_npz
from dgrad.data.partitioning import partition
from dgrad.data.sources import dataset_loader, default_data_root, load_dataset
from dgrad.data.splits import Dataset, Split, unit

__all__ = [
    "BINARIZATIONS",
    "UNKNOWN",
    "Batch",
    "Batches",
    "Dataset",
    "LabelledImages",
    "SemiSupervisedBatches",
    "Split",
    "binarize",
    "choose_labelled",
    "choose_labelled_attributes",
    "dataset_loader",
    "default_data_root",
    "download_idx",
    "load_dataset",
    "load_folder",
    "load_idx",
    "load_npz",
    "partition",
    "unit",
]
