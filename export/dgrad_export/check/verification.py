"""Whether an export on disk is what was written and computes what it computed then."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dgrad.errors import InputError
from dgrad_export.check.reference import COUNT, IMAGE_TOLERANCE, Arrays, compare_with_reference
from dgrad_export.codec.manifest import MANIFEST, REFERENCE, damaged, graph_file, read_manifest
from dgrad_export.codec.session import open_session, read_listed

INT8_IMAGE_TOLERANCE = 5e-3
"""An activation halfway between two integers may be rounded either way."""


def check_export(directory: Path) -> dict[str, Any]:
    """Check that an export is what was written, and computes what it computed then.

    - The files are those of the manifest.
    - The graphs are valid ONNX with the inputs and outputs that the manifest lists.
    - They give the stored outputs for the reference examples, together and one by one: real numbers within a tolerance,
      codes the same unless two are a tie.

    Returns:
        The numbers of `files` and `examples`, and `largest`, the largest difference of a real number.

    Raises:
        InputError: something is missing or is not what was written.
        RunError: a graph gives something else.
    """
    manifest = read_manifest(directory)
    if REFERENCE not in manifest["files"]:
        raise InputError(f"{directory} has no {REFERENCE}: an older dgrad wrote it; export the run again")
    contents = {name: read_listed(directory, name, manifest) for name in manifest["files"]}
    arrays = _arrays(directory / REFERENCE, contents[REFERENCE])
    largest = 0.0
    for name in ("encoder", "decoder"):
        file = graph_file(manifest, name)
        _check_graph(directory / file, contents[file], manifest["files"][file])
        tolerance = INT8_IMAGE_TOLERANCE if manifest.get("int8") else IMAGE_TOLERANCE
        try:
            largest = max(largest, compare_with_reference(name, open_session(contents[file]), arrays, tolerance))
        except KeyError as error:
            raise damaged(directory / REFERENCE, f"{error.args[0]} is missing") from None
    return {"files": len(contents) + 1, "examples": COUNT, "largest": largest}


def _arrays(path: Path, data: bytes) -> Arrays:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # an archive that was no archive when it was listed
        raise damaged(path, str(error)) from None


def _check_graph(path: Path, data: bytes, entry: dict[str, Any]) -> None:
    try:
        proto = onnx.load_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # protobuf's and the checker's have no common base but this
        raise InputError(
            f"{path} is no valid ONNX graph: {' '.join(str(error).split())[:300]}; export the run again"
        ) from None
    for kind, tensors in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        found = [signature(tensor) for tensor in tensors]
        if found != entry.get(kind):
            raise InputError(
                f"{path} has the {kind} {_names(found)}; {MANIFEST} says {_names(entry.get(kind))}: "
                "export the run again"
            )


def signature(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, shape and data type of a graph's input or output."""
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "shape": [axis.dim_param or axis.dim_value for axis in tensor.shape.dim],
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
    }


def _names(tensors: Any) -> str:
    try:
        return ", ".join(f"{tensor['name']} {tensor['shape']} {tensor['dtype']}" for tensor in tensors)
    except (TypeError, KeyError):
        return "something else"
