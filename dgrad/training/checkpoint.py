"""Checkpoints, and what writes any file whole or not at all. May import torch, safetensors and dgrad.files.atomic; never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dgrad.errors import InputError
from dgrad.files.atomic import replacing, umask, write_text

__all__ = ["STATE_KEYS", "damaged", "load_checkpoint", "replacing", "save_checkpoint", "umask", "write_text"]

STATE_KEYS = {"step", "epoch", "seconds", "losses_summed", "best", "image_shape", "config"}
"""What the JSON state of a checkpoint holds."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON state into one safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors, metadata={"state": json.dumps(state)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON state of a checkpoint.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = json.loads((file.metadata() or {})["state"])
        if missing := STATE_KEYS - (state.keys() if isinstance(state, dict) else set()):
            raise ValueError(f"its state lacks {', '.join(sorted(missing))}")
        return tensors, state
    except OSError as error:
        raise InputError(
            f"cannot read checkpoint {path}: {error.strerror or error}; expected the run's checkpoint.safetensors"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> InputError:
    """The error for a checkpoint that cannot be what a run wrote."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"checkpoint {path} is damaged ({detail}); restore it from a copy or train again")
