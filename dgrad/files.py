"""Writing files whole or not at all, and checkpoints. May import torch and safetensors; never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dgrad.errors import InputError

STATE_KEYS = {"step", "epoch", "seconds", "losses_summed", "best", "image_shape", "config"}
"""What the JSON state of a checkpoint holds."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, name):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that this process leaves out of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
