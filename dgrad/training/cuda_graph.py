"""Training steps recorded once as a CUDA graph and replayed: one launch for a whole step.

A recorded step repeats its work with the same memory. So the host may tell it nothing. It reads from tensors on the
device which step it is, what the schedules say and which images come next (`DeviceStep`). All that it changes stays in
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.core.schedules import Schedule
from dgrad.data import Batch, Batches, SemiSupervisedBatches

WARM_UP = 3
"""Steps before recording, in which kernels are compiled and libraries allocate; their effect is undone."""


class CudaGraphError(Exception):
    """The step cannot be replayed; the text says why."""


class DeviceStep:
    """A training step that reads all it needs on the device, so that calling it again and again is training.

    It takes whole batches alone. After a step that was done in another way, `at` puts it right.

    Args:
        batches: what it trains on; their order has to be in place (`Batches.advance`) when the step runs.
        schedules: every schedule that moves, with the 0-d tensors that take its values.
        update: what is done with a batch.
        steps: how many steps the run has.
    """

    def __init__(
        self,
        batches: Batches | SemiSupervisedBatches,
        schedules: Sequence[tuple[Schedule, list[Tensor]]],
        update: Callable[[Batch], None],
        steps: int,
    ) -> None:
        device = batches.order.device
        whole = len(batches.order) // batches.batch_size
        self.batches = batches
        self.update = update
        self.orders: Int[Tensor, "whole batch"] = batches.order[: whole * batches.batch_size].view(whole, -1)
        self.step: Int[Tensor, "1"] = torch.zeros(1, dtype=torch.int64, device=device)
        self.scheduled = [tensor for _, tensors in schedules for tensor in tensors]
        # A row for each step, a column for each tensor.
        self.values: Float[Tensor, "steps scheduled"] = torch.tensor(
            [[schedule(step) for schedule, tensors in schedules for _ in tensors] for step in range(steps)],
            dtype=torch.float32,
            device=device,
        )

    def at(self, step: int) -> None:
        """Make `step` the next one."""
        self.step.fill_(step)

    def __call__(self) -> None:
        if self.scheduled:
            torch._foreach_copy_(self.scheduled, list(self.values.index_select(0, self.step)[0].unbind()))
        index = self.orders.index_select(0, self.step % self.batches.steps_per_epoch)[0]  # [B]
        self.update(self.batches.gather(index))
        self.step += 1


class CudaGraphSteps:
    """One or several steps, recorded together as one CUDA graph, each a branch that may run beside the others.

    Args:
        steps: functions that launch their work and wait for nothing.
        state: gives every tensor that the steps change.
        generators: that they draw from.

    Raises:
        CudaGraphError: they wait for the device, or replace a tensor where they should change it. Nothing has changed
            then.
    """

    def __init__(
        self,
        steps: Sequence[Callable[[], None]],
        state: Callable[[], Iterable[Tensor]],
        generators: Iterable[Generator],
    ) -> None:
        self.steps = steps
        self.streams = [torch.cuda.Stream() for _ in steps]
        self.graph = torch.cuda.CUDAGraph()
        generators = list(generators)
        restore = _remember(state, generators)
        try:
            for turn in range(WARM_UP):
                # The first may compile and allocate; what waits for the device in the last one cannot be recorded.
                torch.cuda.set_sync_debug_mode("default" if turn < WARM_UP - 1 else "error")
                self._launch()
                restore()
            for generator in generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self._launch()
        except RuntimeError as error:
            restore()
            raise CudaGraphError(str(error).splitlines()[0]) from None
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def replay(self) -> None:
        """Do all the steps once more; returns before they are done."""
        self.graph.replay()

    def _launch(self) -> None:
        origin = torch.cuda.current_stream()
        for step, stream in zip(self.steps, self.streams, strict=True):
            stream.wait_stream(origin)
            with torch.cuda.stream(stream):
                step()
        for stream in self.streams:
            origin.wait_stream(stream)


def _remember(state: Callable[[], Iterable[Tensor]], generators: list[Generator]) -> Callable[[], None]:
    """A function that restores everything as it is now. Tensors of later, such as an optimizer's moments, become zero.

    It raises CudaGraphError where a tensor has been replaced by another.
    """
    before = {tensor.data_ptr(): tensor.detach().clone() for tensor in state()}
    noise = [generator.get_state() for generator in generators]

    @torch.no_grad()
    def restore() -> None:
        now = {tensor.data_ptr(): tensor for tensor in state()}
        if not before.keys() <= now.keys():
            raise CudaGraphError(
                "a step puts a new tensor where it should change one in place (copy_, lerp_): "
                "its next replay would start from the old one"
            )
        for place, tensor in now.items():
            if place in before:
                tensor.copy_(before[place])
            else:
                tensor.zero_()
        for generator, saved in zip(generators, noise, strict=True):
            generator.set_state(saved)

    return restore
