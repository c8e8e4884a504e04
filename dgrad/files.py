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
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
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
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads((file.metadata() or {})["state"])  # noqa: SIM118
    except OSError as error:
        raise InputError(
            f"cannot read checkpoint {path}: {error.strerror or error}; expected the run's checkpoint.safetensors"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"checkpoint {path} is damaged ({' '.join(str(error).split())}); restore it from a copy or train again"
        ) from None
