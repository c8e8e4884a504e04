"""Draws that layers, estimators and networks share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

T = TypeVar("T")


def seed_for(purpose: str, *numbers: int) -> int:
    """The seed of a generator for one purpose, from the numbers that it depends on: a run's seed, a rank.

    Mixed, not added: torch's generator on a CPU looks at the lower 32 bits of a seed alone.

    >>> seed_for("evaluation", 0) % 2**32 == seed_for("training noise", 0) % 2**32
    False
    """
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1  # torch takes 63 bits


def gumbel(
    like: Float[Tensor, "batch *rest"], samples: int = 1, *, generator: Generator | None = None
) -> Float[Tensor, "samples batch *rest"]:
    """Independent Gumbel(0, 1) noise, `samples` times the shape of `like`.

    It is on the device of `like`, in float32 or wider, and always finite.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    uniform = torch.rand((samples, *like.shape), dtype=dtype, device=like.device, generator=generator)
    # -log(-log U); a draw of exactly 0 would be infinite. `exponential_` takes almost three times as long on a CPU.
    return uniform.clamp_min_(torch.finfo(dtype).tiny).log_().neg_().log_().neg_()


def drop(x: Tensor, rate: float, *, generator: Generator | None = None) -> Tensor:
    """`x` with each number made 0 with probability `rate`, and the others scaled so that the mean stays."""
    if rate == 0:
        return x
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * kept / (1 - rate)


class RandomState:
    """The state of the random generators that an evaluation may draw from: torch's own, and others that are named.

    A sweep evaluates changed codes from the state that the code itself was evaluated from. So a code and its changed
    codes see the same dropout masks. Under `torch.compile`, and while a CUDA graph is recorded, nothing is noted.

    >>> state = RandomState(torch.device("cpu"))
    >>> first = torch.rand(3)
    >>> state.has_moved(), bool((state.again(torch.rand, 3) == first).all())
    (True, True)
    """

    def __init__(self, device: torch.device, generators: Iterable[Generator] = ()) -> None:
        self.generators: list[Generator] = []
        if not torch.compiler.is_compiling() and not (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            self.generators = [torch.default_generator, *generators]
            if device.type == "cuda":
                index = torch.cuda.current_device() if device.index is None else device.index
                self.generators.append(torch.cuda.default_generators[index])
        self.states = [generator.get_state() for generator in self.generators]

    def has_moved(self) -> bool:
        """Whether anything was drawn since. It waits for no device: states are kept on the CPU."""
        try:
            return any(
                generator.get_state().numpy().tobytes() != state.numpy().tobytes()
                for generator, state in zip(self.generators, self.states, strict=True)
            )
        except RuntimeError:  # inside a transformation of torch.func a state has no bytes
            return False

    def again(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result with the generators in the state of then. Afterwards they are where they are now."""
        now = [generator.get_state() for generator in self.generators]
        self._set(self.states)
        try:
            return function(*arguments)
        finally:
            self._set(now)

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
