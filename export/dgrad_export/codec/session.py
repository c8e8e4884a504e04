"""Opening and running an ONNX model in onnxruntime, on the CPU and without messages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from dgrad.errors import InputError, RunError
from dgrad_export.codec.manifest import MANIFEST, damaged


def open_session(model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session for a serialised model, with `threads` threads in each operator. 0: as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting in a loop takes cores from others. Threads do so between operators, where waking up would take longer, and
    # never between runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Failures raise. The same again on stderr helps nobody.
    options.log_severity_level = 4
    onnxruntime.disable_telemetry_events()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def read_listed(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The contents of a file of an export, checked against the manifest.

    Raises:
        InputError: the file is missing, unreadable, or not the one that was written.
    """
    path = directory / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; restore it from a copy or export the run again: {MANIFEST} lists it"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; make it readable or export the run again") from None
    entry = manifest["files"][name]
    if len(data) != entry["size"]:
        raise damaged(path, f"{len(data)} bytes, {MANIFEST} says {entry['size']}")
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise damaged(path, f"its sha256 is {found[:12]}..., {MANIFEST} says {entry['sha256'][:12]}...")
    return data


def open_listed(directory: Path, name: str, manifest: dict[str, Any], threads: int = 1) -> onnxruntime.InferenceSession:
    """A session for a graph of an export.

    Raises:
        InputError: the file is not the one that was written, or this onnxruntime cannot load it.
    """
    data = read_listed(directory, name, manifest)
    try:
        return open_session(data, threads)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        detail = " ".join(str(error).split())
        raise InputError(
            f"onnxruntime cannot load {directory / name} ({detail}); install a newer onnxruntime"
        ) from None


def run_session(
    session: onnxruntime.InferenceSession, outputs: list[str], feed: dict[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """The outputs of a graph.

    Raises:
        RunError: onnxruntime failed.
    """
    try:
        results: list[npt.NDArray[Any]] = session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise RunError(f"onnxruntime failed: {' '.join(str(error).split())}; try fewer at a time") from None
    return results
