"""A decoder with weights of 8 bits, about a quarter of the size.

Weights have a scale for each output channel: `w = scale * integer`, the integers from -127 to 127. A layer has one of
three forms, in ONNX's own operators:

- Its input is a code, zeros and ones: a product of integers, exact but for the weights.
- Its input comes from a ReLU: a product of integers, with a scale of the input for each example.
- Any other layer: the weights become floats again before they are used.

`onnxruntime.quantization.quantize_dynamic` has one scale for a batch, which makes an image depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node

from dgrad.errors import RunError

LARGEST = 127
"""Of weights and inputs. CPUs without VNNI add pairs of products in 16 bits, and 2 * 127 * 127 fits."""
FEWEST = 256
"""Numbers of a weight below which it stays float."""
OUTPUT_AXIS = {"Gemm": 0, "MatMul": 1, "Conv": 0, "ConvTranspose": 1}
"""The axis of the output channels in the weight."""
KEEPS_ZEROS_AND_ONES = {"Cast", "Identity", "Reshape", "Unsqueeze", "Flatten"}


def quantize(model: bytes) -> bytes:
    """The same graph with weights of 8 bits.

    Raises:
        RunError: it has no weights that could be.
    """
    proto = onnx.load_from_string(model)
    graph = _Graph(proto)
    for node in list(proto.graph.node):
        graph.add(node)
    if not graph.scales:
        raise RunError("--int8 found no layer in the decoder to quantise; nothing was written: leave --int8 out")
    del proto.graph.node[:]
    proto.graph.node.extend(graph.nodes)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def integers(weight: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight as integers of its shape, and a scale for each index of `axis`."""
    largest = np.abs(weight).max(axis=tuple(other for other in range(weight.ndim) if other != axis), keepdims=True)
    scale = (np.where(largest > 0, largest, 1) / LARGEST).astype(np.float32)
    return np.rint(weight / scale).clip(-LARGEST, LARGEST).astype(np.int8), scale.reshape(-1)


class _Graph:
    """The nodes of a graph while they are replaced, one by one."""

    def __init__(self, proto: ModelProto) -> None:
        self.graph = proto.graph
        self.nodes: list[NodeProto] = []
        self.scales: set[str] = set()
        self.weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.maker_of = {output: node for node in proto.graph.node for output in node.output}
        self.uses = [name for node in proto.graph.node for name in node.input]

    def add(self, node: NodeProto) -> None:
        """Add the node, or those that take its place."""
        if node.op_type in OUTPUT_AXIS and self._is_large(node.input[1]):
            if _is_linear(node) and self.uses.count(node.input[1]) == 1:
                if self._is_code(node.input[0]):
                    self._multiply(node, self._of_code)
                    return
                if self._maker(node.input[0]) == "Relu":
                    self._multiply(node, self._of_positive)
                    return
            self._restore(node.input[1], OUTPUT_AXIS[node.op_type])
        self.nodes.append(node)

    def _is_large(self, name: str) -> bool:
        tensor = self.weights.get(name)
        return (
            tensor is not None
            and tensor.data_type == TensorProto.FLOAT
            and len(tensor.dims) > 1
            and np.prod(tensor.dims) >= FEWEST
        )

    def _maker(self, name: str) -> str:
        return self.maker_of[name].op_type if name in self.maker_of else ""

    def _is_code(self, name: str) -> bool:
        """Whether a tensor holds zeros and ones: comparisons, only reshaped."""
        kind = self._maker(name)
        return kind == "Equal" or (kind in KEEPS_ZEROS_AND_ONES and self._is_code(self.maker_of[name].input[0]))

    def _constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(values, name)
            self.graph.initializer.append(self.weights[name])
        return name

    def _split(self, name: str, axis: int, *, transposed: bool = False) -> tuple[str, str]:
        """A weight replaced by its integers and scales."""
        tensor = self.weights.pop(name)
        whole, scale = integers(numpy_helper.to_array(tensor), axis)
        self.graph.initializer.remove(tensor)
        self.scales.add(name)
        integer = np.ascontiguousarray(whole.T) if transposed else whole
        return self._constant(f"{name}.int8", integer), self._constant(f"{name}.scale", scale)

    def _restore(self, name: str, axis: int) -> None:
        integer, scale = self._split(name, axis)
        self.nodes.insert(0, make_node("DequantizeLinear", [integer, scale], [name], axis=axis))  # before all its uses

    def _multiply(self, node: NodeProto, prepare: Callable[[str, str], tuple[str, str | None]]) -> None:
        """`out = (input_scale *) weight_scale * (integers @ integers) + bias`."""
        (out,) = node.output
        weight, weight_scale = self._split(node.input[1], 0, transposed=True)
        whole, input_scale = prepare(node.input[0], out)
        value = self._step("MatMulInteger", [whole, weight], f"{out}.sums")
        value = self._step("Cast", [value], f"{out}.float", to=TensorProto.FLOAT)
        if input_scale is not None:
            value = self._step("Mul", [value, input_scale], f"{out}.unscaled")
        value = self._step("Mul", [value, weight_scale], f"{out}.product")
        self._step("Add", [value, node.input[2]], out)

    def _of_code(self, name: str, out: str) -> tuple[str, str | None]:
        return self._step("Cast", [name], f"{out}.integers", to=TensorProto.UINT8), None

    def _of_positive(self, name: str, out: str) -> tuple[str, str | None]:
        """`rint(x / s)` with `s = max(x) / 127` of each example."""
        axis = self._constant("int8.axis", np.array([-1]))
        least = self._constant("int8.least", np.array(1e-30, np.float32))
        levels = self._constant("int8.levels", np.array(LARGEST, np.float32))
        largest = self._step("ReduceMax", [name, axis], f"{out}.largest", keepdims=1)
        scale = self._step("Div", [self._step("Max", [largest, least], f"{out}.positive"), levels], f"{out}.scale")
        levelled = self._step("Round", [self._step("Div", [name, scale], f"{out}.divided")], f"{out}.rounded")
        return self._step("Cast", [levelled], f"{out}.integers", to=TensorProto.UINT8), scale

    def _step(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(make_node(kind, inputs, [output], **attributes))
        return output


def _is_linear(node: NodeProto) -> bool:
    """Whether a node is `x @ weight.T + bias`."""
    if node.op_type != "Gemm" or len(node.input) != 3:
        return False
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    default = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return {**default, **found} == {**default, "transB": 1}
