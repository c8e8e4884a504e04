"""The stream of batches a training run draws from.

Nothing in `Batches` waits for the device: where the stream stands is known to the host without asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dgrad.data.splits import Split, unit
from dgrad.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """Images `[B, C, H, W]` float32 in [0, 1], labels `[B]` or `[B, n]` int64 or None, and the images' places in
    the split `[B]`.

    `share` is how much of the whole batch these images are: 1 but where several processes have a part each.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    share: float = 1.0


class Batches:
    """An endless iterator of batches, one freshly shuffled epoch after the other, on the split's device.

    `generator` (on that device) decides the order, one permutation at each epoch's beginning. With `dynamic` it also
    draws each pixel anew, as a Bernoulli variable, each time the image is shown. An epoch's last batch may be short;
    `drop_last` leaves it out.

    Of `ranks` streams with generators of one seed, each has its own part of the same batches, with the same pixels.

    Raises InputError for a batch size below 1, a generator on another device, and an epoch without a single batch.

    >>> split = Split(torch.zeros(5, 1, 2, 2))
    >>> batches = Batches(split, 2, generator=torch.Generator().manual_seed(0))
    >>> [len(next(batches).index) for _ in range(4)]
    [2, 2, 1, 2]
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator,
        dynamic: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        device = split.images.device
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}; expected 1 or more")
        if generator.device.type != device.type:
            raise InputError(
                f"a generator on {generator.device} for data on {device}; make it there: torch.Generator({device})"
            )
        self.split = split
        self.batch_size = batch_size
        self.generator = generator
        self.dynamic = dynamic
        self.rank = rank
        self.ranks = ranks
        self.steps_per_epoch = len(split) // batch_size if drop_last else -(-len(split) // batch_size)
        if self.steps_per_epoch == 0:
            raise InputError(
                f"no batch of {batch_size} in a split of {len(split)} images; expected at least one in an epoch; lower "
                "the batch size, or keep the last short batch"
            )
        # As at the end of an epoch: the first batch draws the first order.
        self._position = self.steps_per_epoch
        # It keeps its place in memory, so that a CUDA graph may read it.
        self.order = torch.zeros(len(split), dtype=torch.int64, device=device)
        self._epoch_start = generator.get_state()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        return self.gather(self.advance())

    @property
    def generators(self) -> list[torch.Generator]:
        """What it draws from."""
        return [self.generator]

    def advance(self) -> Tensor:
        """Move on by a batch: the places of its images in the split `[B]`.

        A new epoch draws its order into `self.order`.
        """
        if self._position == self.steps_per_epoch:
            self._epoch_start = self.generator.get_state()
            self._shuffle()
            self._position = 0
        start = self._position * self.batch_size
        self._position += 1
        return self.order[start : start + self.batch_size]

    def gather(self, whole: Tensor) -> Batch:
        """This rank's part of the batch of these places; with `dynamic` its pixels are drawn."""
        part, share = part_of(len(whole), self.rank, self.ranks)
        index = whole[part]
        images = unit(self.split.images.index_select(0, index))
        if self.dynamic:
            # A third of the time that torch.bernoulli takes on a CPU. For the whole batch, so that all ranks stay
            # in step.
            noise = torch.rand((len(whole), *images.shape[1:]), generator=self.generator, device=images.device)
            images = (noise[part] < images).float()
        labels = self.split.labels
        return Batch(images, None if labels is None else labels.index_select(0, index), index, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream stands, as tensors on the CPU: a few kB, as the order is drawn again and not stored."""
        return {
            "generator": self.generator.get_state(),
            "generator_at_epoch_start": self._epoch_start,
            "position": torch.tensor(self._position),
            "layout": self._layout(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on bit for bit where `state_dict()` was called, in the middle of an epoch too. It moves the generator.

        Raises InputError where the state is that of another split's size, batch size, `drop_last`, or kind of device.
        """
        if not torch.equal(state["layout"].cpu(), self._layout()):
            raise InputError(
                "the saved stream had (images, batch size, batches in an epoch) = "
                f"{tuple(state['layout'].tolist())}; expected {tuple(self._layout().tolist())}; resume with the "
                "settings that the run began with"
            )
        if state["generator"].numel() != self.generator.get_state().numel():
            raise InputError(
                "the saved stream comes from another kind of device; expected a state of a generator on "
                f"{self.generator.device}; resume on the device that the run began on"
            )
        self._position = int(state["position"])
        self._epoch_start = state["generator_at_epoch_start"].cpu().clone()
        if self._position < self.steps_per_epoch:
            self.generator.set_state(self._epoch_start)
            self._shuffle()
        self.generator.set_state(state["generator"].cpu())

    def _shuffle(self) -> None:
        torch.randperm(len(self.split), generator=self.generator, device=self.order.device, out=self.order)

    def _layout(self) -> Tensor:
        return torch.tensor([len(self.split), self.batch_size, self.steps_per_epoch])


def part_of(count: int, rank: int, ranks: int) -> tuple[slice, float]:
    """The part of a batch of `count` images that falls to one of `ranks`, and its share of the batch.

    The parts differ by one image at most. A rank for which none is left takes one of another's with a share of 0,
    so that no rank ever computes with nothing.

    >>> [part_of(5, rank, 2) for rank in range(2)]
    [(slice(0, 2, None), 0.4), (slice(2, 5, None), 0.6)]
    >>> part_of(1, 0, 2)
    (slice(0, 1, None), 0.0)
    """
    first, end = rank * count // ranks, (rank + 1) * count // ranks
    return slice(first, max(end, first + 1)), (end - first) / count
