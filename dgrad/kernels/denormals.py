"""Denormal numbers as zeros: on many processors arithmetic with them takes a hundred times as long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST_NORMAL = sys.float_info.min


def flushed() -> bool:
    """Whether this thread takes denormal numbers for zeros."""
    return _SMALLEST_NORMAL / 2 == 0.0


@contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Within it, this thread takes denormal numbers for zeros where the device is a CPU.

    Afterwards the thread does what it did before.
    """
    before = flushed()
    if device.type != "cpu" or before:
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
