"""Reference examples of an export: inputs, and the outputs of its graphs when it was written.

The images are noise, so that an export holds nothing of the training data.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from dgrad.errors import RunError
from dgrad_export.codec.session import open_session, run_session

COUNT = 4
LOGIT_TOLERANCE = 1e-4
"""Of a logit, times its size where that is above 1. Float32 sums in another order differ that much."""
IMAGE_TOLERANCE = 1e-5

Arrays = dict[str, npt.NDArray[Any]]


def make_reference(encoder: bytes, decoder: bytes, values: int | None) -> bytes:
    """A .npz with inputs and outputs of both graphs for 4 examples, such as `encoder.image` and `decoder.code`.

    Args:
        values: values of each number of a code. None where only the encoder's own codes are known to be valid.
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
    if tensor.type == "tensor(float)":
        return draws.standard_normal(shape, np.float32)
    if values is not None:
        return draws.integers(values, size=shape)
    assert code is not None
    return code


def compare_with_reference(
    name: str, session: onnxruntime.InferenceSession, arrays: Arrays, image_tolerance: float
) -> float:
    """The largest difference from the stored outputs.

    Raises:
        RunError: an output differs by more than is allowed.
    """
    feed = {tensor.name: arrays[f"{name}.{tensor.name}"] for tensor in session.get_inputs()}
    expected = {tensor.name: arrays[f"{name}.{tensor.name}"] for tensor in session.get_outputs()}
    largest = 0.0
    for start, end in ((0, COUNT), *((row, row + 1) for row in range(COUNT))):
        results = run_session(session, list(expected), {key: array[start:end] for key, array in feed.items()})
        for (output, whole), got in zip(expected.items(), results, strict=True):
            truth, title = whole[start:end], f"{output} of the {name}"
            if got.shape != truth.shape or got.dtype != truth.dtype:
                raise RunError(
                    f"{title} is {list(got.shape)} of {got.dtype}; "
                    f"it was {list(truth.shape)} of {truth.dtype} at export"
                )
            if truth.dtype.kind != "f":
                _check_codes(title, truth, got, _potentials(output, arrays, start, end))
                continue
            difference = np.where(got == truth, 0, np.abs(got.astype(np.float64) - truth))
            allowed = image_tolerance if output == "image" else LOGIT_TOLERANCE * np.maximum(1, np.abs(truth))
            largest = max(largest, float(difference.max(initial=0)))
            if not (difference <= allowed).all():  # written so that nan fails
                raise RunError(
                    f"{title} differs by {difference.max():.3g} from what it was at export; "
                    f"{np.min(allowed):g} is allowed: "
                    "restore the export from a copy, or export the run again with this onnxruntime"
                )
    return largest


def _potentials(output: str, arrays: Arrays, start: int, end: int) -> npt.NDArray[np.float64]:
    """The numbers whose argmax is the code."""
    logits = arrays["encoder.logits"][start:end].astype(np.float64)
    if output == "sample":
        return np.asarray(logits - np.log(-np.log(arrays["encoder.uniform"][start:end].astype(np.float64))))
    return logits


def _check_codes(
    title: str, truth: npt.NDArray[np.int64], got: npt.NDArray[np.int64], potentials: npt.NDArray[np.float64]
) -> None:
    """Check that codes are the same but for ties of independent variables."""
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
            f"{title} differs from what it was at export in {int(different.sum())} of {different.size} numbers, "
            "and not for a tie: restore the export from a copy, or export the run again with this onnxruntime"
        )
