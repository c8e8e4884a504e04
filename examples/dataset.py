"""A data set: `dgrad train --plugin examples/dataset.py --dataset bars-and-stripes --latent 8x2`."""

from pathlib import Path

import torch

import dgrad
from dgrad.data import Dataset, partition

SIDE = 8


def bars_and_stripes(data_root: Path) -> Dataset:
    """Whole columns or whole rows of 8x8 pixels, at random: 408 train, 50 valid, 50 test; made, not loaded"""
    # The numbers 1 ... 254 as eight bits; the empty and the full image would be both bars and stripes.
    patterns = (torch.arange(1, 2**SIDE - 1).unsqueeze(-1) >> torch.arange(SIDE) & 1).float()  # [254, 8]
    bars = patterns[:, None, None, :].expand(-1, 1, SIDE, SIDE)  # [254, 1, 8, 8]
    images = torch.cat([bars, bars.transpose(2, 3)])  # [508, 1, 8, 8], float32 in [0, 1]
    labels = torch.arange(2).repeat_interleave(len(bars))  # int64
    return partition("bars-and-stripes", images, labels, ("bars", "stripes"), valid=50, test=50)


@dgrad.hookimpl
def dgrad_register_datasets(register):
    register("bars-and-stripes", bars_and_stripes)
