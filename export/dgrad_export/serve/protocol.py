"""The Open Inference Protocol, version 2, as bytes: requests to arrays, arrays to answers.

JSON: https://github.com/kserve/open-inference-protocol. The binary tensor extension:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html.
A request is checked in time linear in its size, before any work on its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError, unknown_name
from dgrad_export.serve.served_model import Served, TensorSpec

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says where the JSON part ends and the binary tensors start."""
MOST_AXES = 32
"""Axes that a shape or nested data may have. A graph has far fewer."""


@dataclass(frozen=True)
class Inference:
    """A parsed request. `outputs` are pairs of a name and whether its data shall be binary."""

    id: str | None
    values: dict[str, npt.NDArray[Any]]
    outputs: list[tuple[str, bool]]

    @property
    def examples(self) -> int:
        """How many examples there are, where the values are checked."""
        return len(next(iter(self.values.values())))


def read_request(model: Served, body: bytes, header_length: str | None = None) -> Inference:
    """Take a request apart. `model.check` checks ranges and the number of examples afterwards.

    Args:
        body: the JSON, followed by the binary tensors where there are some.
        header_length: the bytes of JSON, as the HTTP header says it. None for all of them.

    Raises:
        InputError: the body is no such request, or names what the model has not.
    """
    end = _json_length(header_length, len(body))
    request = _object(_parse(body[:end]), "the request")
    binary = _Binary(memoryview(body)[end:])
    values = {}
    for entry in _list(request, "inputs"):
        name, array = _read_input(model, _object(entry, "an input"), binary)
        if name in values:
            raise InputError(f"input {name} is there twice; expected it once")
        values[name] = array
    binary.check_used_up()
    if missing := [name for name in model.inputs if name not in values]:
        raise InputError(f"input {missing[0]} is missing; model {model.name} takes {', '.join(model.inputs)}")
    identifier = request.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise InputError(f"id is {_short(identifier)}; expected a string")
    return Inference(identifier, values, _read_outputs(model, request))


def write_response(
    model: Served, inference: Inference, results: Sequence[npt.NDArray[Any]]
) -> tuple[bytes, int | None]:
    """The body of the answer, and its bytes of JSON where binary tensors follow, else None."""
    entries = []
    tensors: list[memoryview] = []
    for (name, binary), result in zip(inference.outputs, results, strict=True):
        datatype = model.outputs[name].datatype
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(result.shape)}
        if binary:
            tensors.append(np.ascontiguousarray(result).data.cast("B"))
            entry["parameters"] = {"binary_data_size": result.nbytes}
        else:
            entry["data"] = result.ravel().tolist()
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model.name, "model_version": "1", "outputs": entries}
    if inference.id is not None:
        answer["id"] = inference.id
    header = json.dumps(answer).encode()
    return b"".join([header, *tensors]), len(header) if tensors else None


def describe(model: Served) -> dict[str, Any]:
    """A model's metadata."""
    tensors = {
        kind: [{"name": spec.name, "datatype": spec.datatype, "shape": spec.protocol_shape} for spec in specs.values()]
        for kind, specs in (("inputs", model.inputs), ("outputs", model.outputs))
    }
    return {"name": model.name, "versions": ["1"], "platform": "onnxruntime_onnx", **tensors}


class _Binary:
    """The binary tensors after the JSON, taken one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def take(self, name: str, size: int) -> memoryview:
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise InputError(
                f"input {name} has {len(self.data) - start} bytes of binary data left in the body; "
                f"its binary_data_size is {size}: the body is cut short, or {HEADER_LENGTH} is wrong"
            )
        return self.data[start : self.position]

    def check_used_up(self) -> None:
        if rest := len(self.data) - self.position:
            raise InputError(f"{rest} bytes are left after the last binary input; expected none")


def _json_length(header_length: str | None, size: int) -> int:
    if header_length is None:
        return size
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise InputError(f"{HEADER_LENGTH} is {_short(header_length)}; expected a number of bytes")
    if (length := int(header_length)) > size:
        raise InputError(f"{HEADER_LENGTH} is {length}; the body has {size} bytes: it is cut short")
    return length


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise InputError("the request is nested too deeply; expected an inference request in JSON") from None
    except ValueError as error:
        raise InputError(
            f"the request is not JSON ({str(error)[:80]}); expected an inference request in JSON, with {HEADER_LENGTH} "
            "where binary data follows"
        ) from None


def _read_input(model: Served, entry: dict[str, Any], binary: _Binary) -> tuple[str, npt.NDArray[Any]]:
    spec = _find(model.inputs, f"input of model {model.name}", entry.get("name"))
    if entry.get("datatype") != spec.datatype:
        raise InputError(f"input {spec.name} is of {_short(entry.get('datatype'))}; expected {spec.datatype}")
    shape = _list(entry, "shape")
    if len(shape) > MOST_AXES or not all(type(axis) is int and 0 <= axis < 2**40 for axis in shape):
        raise InputError(
            f"input {spec.name} has shape {_short(shape)}; expected {spec.protocol_shape}, -1 for any number"
        )
    spec.check_shape(shape)
    count = math.prod(shape)
    size = _object(entry.get("parameters") or {}, "parameters").get("binary_data_size")
    values = _flat_data(spec, entry) if size is None else _binary_values(spec, size, binary)
    if len(values) != count:
        raise InputError(f"input {spec.name} has {len(values)} values; its shape {shape} has {count}")
    return spec.name, (_json_values(spec, values) if isinstance(values, list) else values).reshape(shape)


def _binary_values(spec: TensorSpec, size: Any, binary: _Binary) -> npt.NDArray[Any]:
    if type(size) is not int or size < 0 or size % spec.dtype.itemsize:
        raise InputError(
            f"input {spec.name} has binary_data_size {_short(size)}; expected a multiple of {spec.dtype.itemsize} bytes"
        )
    # The protocol's bytes are little-endian.
    return np.frombuffer(binary.take(spec.name, size), spec.dtype.newbyteorder("<")).astype(spec.dtype, copy=False)


def _flat_data(spec: TensorSpec, entry: dict[str, Any]) -> list[Any]:
    """The numbers of `data`, which may be nested, one axis after the other."""
    values = _list(entry, "data")
    for _ in range(MOST_AXES):
        if not values or type(values[0]) is not list:
            break
        if set(map(type, values)) != {list} or len(set(map(len, values))) > 1:
            raise InputError(
                f"data of input {spec.name} is no array; expected {_kind(spec)}, flat or nested as its shape"
            )
        values = list(chain.from_iterable(values))
    return values


def _json_values(spec: TensorSpec, values: list[Any]) -> npt.NDArray[Any]:
    try:
        if not set(map(type, values)) <= ({int} if spec.dtype.kind == "i" else {int, float}):
            raise TypeError
        with np.errstate(over="ignore"):  # a number beyond the type becomes infinite, which no range holds
            return np.array(values, spec.dtype)
    except (TypeError, OverflowError):
        raise InputError(
            f"data of input {spec.name} is not all {_kind(spec)}; expected {_kind(spec)} for {spec.datatype}"
        ) from None


def _kind(spec: TensorSpec) -> str:
    return "integers" if spec.dtype.kind == "i" else "numbers"


def _read_outputs(model: Served, request: dict[str, Any]) -> list[tuple[str, bool]]:
    parameters = _object(request.get("parameters") or {}, "parameters")
    usual = _flag(parameters, "binary_data_output", False)
    if not request.get("outputs"):
        return [(name, usual) for name in model.outputs]
    outputs = []
    for entry in _list(request, "outputs"):
        _object(entry, "an output")
        spec = _find(model.outputs, f"output of model {model.name}", entry.get("name"))
        own = _object(entry.get("parameters") or {}, "parameters")
        if own.get("classification"):
            raise InputError(
                f"output {spec.name} was asked for as a classification, which is not offered; leave it out"
            )
        outputs.append((spec.name, _flag(own, "binary_data", usual)))
    names = [name for name, _ in outputs]
    if len(set(names)) < len(names):
        raise InputError("an output is asked for twice; expected each once")
    return outputs


def _find(specs: dict[str, TensorSpec], kind: str, name: Any) -> TensorSpec:
    if not isinstance(name, str) or name not in specs:
        raise unknown_name(kind, str(name)[:80], specs)
    return specs[name]


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {_short(value)}; expected true or false")
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {_short(value)}; expected a JSON object")
    return value


def _list(entry: dict[str, Any], name: str) -> list[Any]:
    value = entry.get(name)
    if not isinstance(value, list):
        raise InputError(f"{name} is {'missing' if value is None else _short(value)}; expected a JSON array")
    return value


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 60 else f"{text[:60]}..."
