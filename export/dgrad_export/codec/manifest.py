"""The files of an exported folder, and reading its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgrad.errors import InputError

FORMAT = "dgrad-onnx"
FORMAT_VERSION = 1
ENCODER = "encoder.onnx"
DECODER = "decoder.onnx"
MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
FILES = (ENCODER, DECODER, REFERENCE, MANIFEST)
"""The files of the flat layout."""
LAYOUTS = {
    "flat": {"encoder": ENCODER, "decoder": DECODER},
    "triton": {"encoder": "encoder/1/model.onnx", "decoder": "decoder/1/model.onnx"},
}
"""The graphs of each layout."""
TRITON_CONFIGS = {"encoder": "encoder/config.pbtxt", "decoder": "decoder/config.pbtxt"}
EVERY_FILE = {*FILES, *LAYOUTS["triton"].values(), *TRITON_CONFIGS.values()}
"""The files that any export may have."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        InputError: there is no such folder, it has no manifest, or the manifest is damaged or of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        found = f"it has no {MANIFEST}" if directory.is_dir() else "there is no such directory"
        raise InputError(f"no exported model at {directory}: {found}; expected a directory that dgrad export wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; make it readable or export the run again") from None
    except ValueError as error:
        raise damaged(path, f"not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no manifest of {FORMAT}; expected a directory that dgrad export wrote")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version!r}; expected {FORMAT_VERSION}: "
            "install the dgrad that wrote it, or export the run again"
        )
    _check(path, manifest)
    return manifest


def graph_file(manifest: dict[str, Any], graph: str) -> str:
    """The file, relative to the manifest, of `encoder` or `decoder`."""
    # Exports from before there were layouts are flat.
    files: dict[str, str] = manifest.get("graphs", LAYOUTS["flat"])
    return files[graph]


def is_export(directory: Path) -> bool:
    """Whether a folder holds an export, of this or another format version, whole or not."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def damaged(path: Path, detail: str) -> InputError:
    """The error for a file that is not as it was written, in one line."""
    return InputError(f"{path} is damaged ({' '.join(detail.split())}); restore it from a copy or export the run again")


def _check(path: Path, manifest: dict[str, Any]) -> None:
    """Check the presence and types of everything that the codec needs."""
    if manifest.get("graphs", LAYOUTS["flat"]) not in LAYOUTS.values():
        raise damaged(path, "graphs is not what it should be")
    try:
        latent = manifest["latent"]
        checks = {
            "image_shape": len(manifest["image_shape"]) == 3
            and all(_natural(size) for size in manifest["image_shape"]),
            "latent.spec": isinstance(latent["spec"], str),
            "latent.shape": all(_natural(size) for size in latent["shape"]),
            "latent.code_shape": all(_natural(size) for size in latent["code_shape"]),
            "latent.values": latent["values"] is None or _natural(latent["values"]),
            "latent.sizes": _sizes(latent.get("sizes"), latent["code_shape"], latent["values"]),
            # Older exports have none of these.
            "gaussian": manifest.get("gaussian", 0) == 0 or _natural(manifest["gaussian"]),
            "sampling": isinstance(manifest.get("sampling", False), bool),
            "attributes": _names(manifest.get("attributes"), latent["code_shape"]),
            **{
                name: isinstance(manifest["files"][name]["sha256"], str) and _natural(manifest["files"][name]["size"])
                for name in (graph_file(manifest, graph) for graph in LAYOUTS["flat"])
            },
        }
    except KeyError as error:
        raise damaged(path, f"{error.args[0]} is missing") from None
    except TypeError as error:
        raise damaged(path, str(error)) from None
    for name, passed in checks.items():
        if not passed:
            raise damaged(path, f"{name} is not what it should be")


def _names(value: Any, code_shape: list[int]) -> bool:
    """Whether a value is None or a different name for each variable of the code."""
    if value is None:
        return True
    return isinstance(value, list) and all(map(_text, value)) and [len(set(value))] == code_shape == [len(value)]


def _sizes(value: Any, code_shape: list[int], largest: Any) -> bool:
    """Whether a value is None or the number of values of each variable of the code."""
    if value is None:
        return True
    return (
        isinstance(value, list) and all(map(_natural, value)) and code_shape == [len(value)] and max(value) == largest
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
