"""A few inputs and what the graphs of an export gave for them, and whether they still do. May import numpy, onnx, onnxruntime, dgrad.errors; never torch.

The images are noise: nothing of the data that a model was trained on is in an export.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from dgrad.errors import InputError, RunError
from dgrad_export.codec.manifest import MANIFEST, REFERENCE, damaged, graph_file, read_manifest
from dgrad_export.codec.session import open_session, read_listed, run_session

COUNT = 4
LOGIT_TOLERANCE = 1e-4
"""Of a logit, times its size where that is above 1: float32 sums in another order differ so."""
IMAGE_TOLERANCE = 1e-5
INT8_IMAGE_TOLERANCE = 5e-3
"""Where activations are rounded to integers, one that is halfway may go either way."""

Arrays = dict[str, npt.NDArray[Any]]


def make_reference(encoder: bytes, decoder: bytes, values: int | None) -> bytes:
    """A .npz with the inputs and outputs of both graphs, such as `encoder.image` and `decoder.code`, of 4 examples.

    Args:
        encoder: the serialised encoder.
        decoder: the serialised decoder.
        values: how many values each number of a code has; None where only the encoder's own codes are known to be some.
    """
    draws = np.random.default_rng(0)
    arrays: Arrays = {}
    for name, graph in (("encoder", encoder), ("decoder", decoder)):
        session = open_session(graph)
        feed = {
            tensor.name: _draw(tensor, draws, values, arrays.get("encoder.code")) for tensor in session.get_inputs()
        }
        outputs = [tensor.name for tensor in session.get_outputs()]
        results = dict(zip(outputs, run_session(session, outputs, feed), strict=True))
        arrays |= {f"{name}.{tensor}": array for tensor, array in {**feed, **results}.items()}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _draw(
    tensor: onnxruntime.NodeArg, draws: np.random.Generator, values: int | None, code: npt.NDArray[Any] | None
) -> npt.NDArray[Any]:
    shape = (COUNT, *tensor.shape[1:])
    if tensor.name == "image":
        return (draws.integers(256, size=shape) / 255).astype(np.float32)
    if tensor.name == "uniform":
        return draws.uniform(0.01, 0.99, shape).astype(np.float32)
    if tensor.name == "style":
        return draws.standard_normal(shape, np.float32)
    if values is not None:
        return draws.integers(values, size=shape)
    assert code is not None
    return code


def check_export(directory: Path) -> dict[str, Any]:
    """Make sure that an export is what was written, and computes what it computed then.

    All files are those that the manifest lists; the graphs are valid ONNX and take and give what it says; they give for the reference batch, whole and one by
    one, the outputs stored with it: real numbers within the tolerances above, codes the same where their margin is more than that.

    Returns:
        `files`, `examples`, how many; `largest`, the largest difference of a real number.

    Raises:
        InputError: something is not there or not what was written.
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
            largest = max(largest, _compare(name, open_session(contents[file]), arrays, tolerance))
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
                f"{path} has the {kind} {_names(found)}; {MANIFEST} says {_names(entry.get(kind))}: export the run again"
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


def _compare(name: str, session: onnxruntime.InferenceSession, arrays: Arrays, image_tolerance: float) -> float:
    """The largest difference from what is stored."""
    feed = {tensor.name: arrays[f"{name}.{tensor.name}"] for tensor in session.get_inputs()}
    expected = {tensor.name: arrays[f"{name}.{tensor.name}"] for tensor in session.get_outputs()}
    largest = 0.0
    for start, end in ((0, COUNT), *((row, row + 1) for row in range(COUNT))):
        results = run_session(session, list(expected), {key: array[start:end] for key, array in feed.items()})
        for (output, whole), got in zip(expected.items(), results, strict=True):
            truth, what = whole[start:end], f"{output} of the {name}"
            if got.shape != truth.shape or got.dtype != truth.dtype:
                raise RunError(
                    f"{what} is {list(got.shape)} of {got.dtype}; it was {list(truth.shape)} of {truth.dtype} at export"
                )
            if truth.dtype.kind != "f":
                _check_codes(what, truth, got, _potentials(output, arrays, start, end))
                continue
            difference = np.where(got == truth, 0, np.abs(got.astype(np.float64) - truth))
            allowed = image_tolerance if output == "image" else LOGIT_TOLERANCE * np.maximum(1, np.abs(truth))
            largest = max(largest, float(difference.max(initial=0)))
            if not (difference <= allowed).all():  # written so that nan fails
                raise RunError(
                    f"{what} differs by {difference.max():.3g} from what it was at export; {np.min(allowed):g} is allowed: "
                    "restore the export from a copy, or export the run again with this onnxruntime"
                )
    return largest


def _potentials(output: str, arrays: Arrays, start: int, end: int) -> npt.NDArray[np.float64]:
    """What the code is the argmax of."""
    logits = arrays["encoder.logits"][start:end].astype(np.float64)
    if output == "sample":
        return np.asarray(logits - np.log(-np.log(arrays["encoder.uniform"][start:end].astype(np.float64))))
    return logits


def _check_codes(
    what: str, truth: npt.NDArray[np.int64], got: npt.NDArray[np.int64], potentials: npt.NDArray[np.float64]
) -> None:
    """Make sure that codes are the same but for ties of independent variables."""
    different = truth != got
    if not different.any():
        return
    allowed, gap = 0.0, np.inf
    inside = all(((codes >= 0) & (codes < potentials.shape[-1])).all() for codes in (truth, got))
    if potentials.shape[:-1] == truth.shape and inside:
        pair = [np.take_along_axis(potentials, codes[..., None], -1)[..., 0] for codes in (truth, got)]
        gap = float(np.abs(pair[0] - pair[1]).max())
        allowed = 2 * LOGIT_TOLERANCE * max(1.0, float(np.abs(potentials).max()))
    if gap > allowed:
        raise RunError(
            f"{what} differs from what it was at export in {int(different.sum())} of {different.size} numbers, and not for a tie: "
            "restore the export from a copy, or export the run again with this onnxruntime"
        )
