"""Training by several processes: this process's place among them, its part, and how they agree.

torchrun starts the processes. Torch is imported inside functions only, so that the command line can ask which process
it is before anything heavy is loaded. A process alone never touches torch.distributed.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dgrad.errors import DgradError, InputError, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")

STEPS_BETWEEN_AGREEMENTS = 10
"""Several processes must stop after the same step: they ask each other every so many steps whether to."""
_connections = itertools.count()
"""The connections that this process has made, in the same order as the others."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run and this one's place among them; `ProcessGroup()` is a process alone.

    The methods that exchange something must be called by all processes in the same order, inside `joined`.

    Attributes:
        rank: which of all processes this one is, from 0.
        size: how many processes there are.
        local_rank: which of those on its machine this one is, from 0.
        local_size: how many processes there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ProcessGroup:
        """As torchrun says; alone where it was not torchrun that started this process."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(environment[name]) for name in names))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """How `dgrad` is called with as many processes."""
        if self.size == 1:
            return "dgrad"
        machines = self.size // self.local_size
        nodes = f"--nnodes={machines} " if machines > 1 else ""
        return f"torchrun {nodes}--nproc-per-node={self.local_size} -m dgrad_cli"

    def device(self, name: str) -> torch.device:
        """The device of this process: of several CUDA processes on a machine, each has the GPU of its local rank.

        Raises:
            InputError: there is no such device, or it cannot be shared out.
        """
        import torch

        from dgrad.devices import choose_device

        device = choose_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or device.index is not None:
            raise InputError(
                f"--device {name} is one device for {self.size} processes; expected auto, cuda (each its own) or cpu"
            )
        if self.local_size > torch.cuda.device_count():
            raise InputError(
                f"{self.local_size} processes on a machine with {torch.cuda.device_count()} CUDA devices; "
                f"give torchrun --nproc-per-node={torch.cuda.device_count()}, or train with --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    def noise_seed(self, seed: int) -> int:
        """The seed of this process's noise in a run with the given seed; that of the first is the same as alone."""
        from dgrad.core.random import seed_for

        return seed_for("training noise", seed, self.rank)

    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """The processes connected: by NCCL for CUDA tensors, by gloo for those on the CPU.

        After an error the connection stays until the process ends, so that the others do not report its loss before
        this process says why.

        Args:
            device: the name of the device to train on.

        Raises:
            InputError: there is no such device.
            RunError: another process has ended.
        """
        if self.size == 1:
            yield
            return
        import torch
        from torch import distributed
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        own = self.device(device)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        # A store of its own: in the common one gloo finds the addresses of an earlier connection, and waits for them.
        store, rank, size = next(rendezvous("env://"))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
            store=PrefixStore(f"dgrad/{next(_connections)}", store),
            rank=rank,
            world_size=size,
        )
        with warnings.catch_warnings():
            # True of every layer with one output, whose two strides mean the same.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            try:
                yield
            except RuntimeError as error:
                ours = isinstance(error, DgradError)
                if ours or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                    raise
                raise RunError(
                    f"process {self.rank} of {self.size} lost its connection to another, which says why, if it could; "
                    "the run goes on from its last checkpoint with --resume"
                ) from error
        distributed.destroy_process_group()

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the first process, where alone it is called. Its error is raised in all processes.

        Args:
            make: its result can be pickled.
        """
        if self.size == 1:
            return make()
        from torch import distributed

        outcome: list[Value | Exception | None] = [None]
        if self.is_first:
            try:
                outcome = [make()]
            except (DgradError, OSError) as error:
                outcome = [error]
        distributed.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """What each process gives, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Value | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any_after(self, step: int, flag: bool) -> bool:
        """Whether the flag is set in any process; several ask each other every `STEPS_BETWEEN_AGREEMENTS` steps.

        The host waits for the other hosts. No device is asked.
        """
        if self.size == 1 or step % STEPS_BETWEEN_AGREEMENTS:
            return flag and self.size == 1
        import torch

        return bool(self.sum(torch.tensor(float(flag))))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same in all to the last digit."""
        if self.size == 1:
            return tensor
        from torch import distributed

        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total
