"""Choosing the device."""

from __future__ import annotations

import torch

from dgrad.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a CUDA GPU where there is one, else the CPU.

    Raises:
        InputError: the name is none, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InputError(
            f"device {name!r} is not there: torch sees {count} CUDA devices; use --device auto or --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there: torch sees no Apple GPU; use --device auto or --device cpu")
    return device


def all_devices(names: str | None) -> list[str]:
    """The devices that several runs are given in turn.

    Args:
        names: separated by commas; None for every GPU that torch sees, or else the CPU.

    Raises:
        InputError: a name is none, or this machine has no such device.
    """
    if names is None and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(choose_device(name.strip())) for name in (names or "auto").split(",")]


def describe_device(device: torch.device) -> str:
    """The device for people: the name of the GPU, or the number of threads on the CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
