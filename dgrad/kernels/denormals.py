"""Denormal numbers as zeros: on many processors arithmetic with them takes a hundred times as long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dgrad.kernels import cpu

_SMALLEST_NORMAL = sys.float_info.min


def flushed() -> bool:
    """Whether this thread takes denormal numbers for zeros."""
    return _SMALLEST_NORMAL / 2 == 0.0


@contextmanager
def flush_denormals(device: torch.device, *, compiled: bool = False) -> Iterator[None]:
    """Within it, denormal numbers are zeros, where the device is a CPU. Afterwards all is as before.

    The setting belongs to a thread, and torch sets it for the calling one alone.

    Args:
        compiled: whether the compiled library may be used, which sets torch's other threads too.
    """
    if device.type != "cpu" or flushed():
        yield
        return
    others = compiled and torch.get_num_threads() > 1 and cpu.available()
    torch.set_flush_denormal(True)
    if others:
        cpu.flush_denormals(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        if others:
            cpu.flush_denormals(False)
