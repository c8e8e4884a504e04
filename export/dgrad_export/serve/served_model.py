"""The graphs of an export as a server sees them: their tensors, the check of inputs, the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from dgrad.errors import InputError
from dgrad_export.codec.manifest import graph_file, read_manifest
from dgrad_export.codec.session import open_listed, run_session

GRAPHS = ("encoder", "decoder")
DATATYPES = {"float32": "FP32", "int64": "INT64"}
"""The Open Inference Protocol's names of the data types that the graphs have."""


@dataclass(frozen=True)
class Range:
    """The numbers that a tensor may hold: `low` to `high`, without these two where they are excluded."""

    low: float
    high: float
    excluded: bool = False

    def holds(self, values: npt.NDArray[Any]) -> bool:
        """Whether all values, at least one, are in the range. No range holds nan."""
        low, high = values.min(), values.max()
        if self.excluded:
            return bool(low > self.low and high < self.high)
        return bool(low >= self.low and high <= self.high)

    def __str__(self) -> str:
        if np.isinf(self.high):
            return "finite numbers"
        if self.excluded:
            return f"numbers above {self.low:g} and below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


FINITE = Range(-np.inf, np.inf, excluded=True)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. `shape` is that of one example, without the batch axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    range: Range

    @cached_property
    def datatype(self) -> str:
        """The protocol's name of the data type."""
        return DATATYPES[self.dtype.name]

    @property
    def protocol_shape(self) -> list[int]:
        """The shape with the free batch axis, -1."""
        return [-1, *self.shape]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Check a shape with its batch axis.

        Raises:
            InputError: it is not this one, or there is no example.
        """
        if tuple(shape[1:]) != self.shape or not shape or shape[0] == 0:
            expected = ", ".join(["N of at least 1", *map(str, self.shape)])
            raise InputError(f"input {self.name} has shape {list(shape)}; expected [{expected}]")

    def check(self, values: npt.NDArray[Any]) -> None:
        """Check that values of the right data type have this shape and range.

        Raises:
            InputError: they do not.
        """
        self.check_shape(values.shape)
        if not self.range.holds(values):
            low, high = values.min(), values.max()
            found = "holds nan" if np.isnan(low) else f"goes from {low:g} to {high:g}"
            raise InputError(f"input {self.name} {found}; expected {self.range}")


class Served:
    """One graph. Several threads may call it at once."""

    def __init__(self, name: str, session: onnxruntime.InferenceSession, ranges: Mapping[str, Range]) -> None:
        self.name = name
        # Tensors as the session has them, not the manifest: the session is what runs.
        self.inputs, self.outputs = (
            {tensor.name: _spec(tensor, ranges.get(tensor.name, FINITE)) for tensor in tensors}
            for tensors in (session.get_inputs(), session.get_outputs())
        )
        self._session = session

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run that the graph is from. Empty where the graph does not carry them."""
        metadata = self._session.get_modelmeta().custom_metadata_map
        settings: dict[str, Any] = json.loads(metadata.get("dgrad.config", "{}"))
        return settings

    def check(self, values: dict[str, npt.NDArray[Any]]) -> None:
        """Check that the graph takes these values, by name and of the right data types.

        Raises:
            InputError: it does not take a shape or a value, or inputs are for different numbers of examples.
        """
        for name, array in values.items():
            self.inputs[name].check(array)
        if len({len(array) for array in values.values()}) > 1:
            counts = ", ".join(f"{name} {len(array)}" for name, array in values.items())
            raise InputError(f"inputs are for different numbers of examples ({counts}); expected the same for all")

    def run(self, values: dict[str, npt.NDArray[Any]], outputs: list[str]) -> list[npt.NDArray[Any]]:
        """The outputs of these names for checked values.

        Raises:
            RunError: onnxruntime failed.
        """
        return run_session(self._session, outputs, values)


def open_models(directory: Path) -> dict[str, Served]:
    """The encoder and the decoder of an export, each with one thread inside onnxruntime.

    Two threads inside onnxruntime are slower on two cores, as one waits for the other to wake up.

    Raises:
        InputError: there is no export, or a file of it is missing, damaged or not the one that was written.
    """
    manifest = read_manifest(directory)
    return {name: _open(directory, name, manifest) for name in GRAPHS}


def _open(directory: Path, name: str, manifest: dict[str, Any]) -> Served:
    session = open_listed(directory, graph_file(manifest, name), manifest)
    ranges = {"image": Range(0, 1), "uniform": Range(0, 1, excluded=True)}
    values = manifest["latent"]["values"]
    if values is not None:
        ranges["code"] = Range(0, values - 1)
    return Served(name, session, ranges)


DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}


def _spec(tensor: Any, value_range: Range) -> TensorSpec:
    return TensorSpec(tensor.name, DTYPES[tensor.type], tuple(tensor.shape[1:]), value_range)
