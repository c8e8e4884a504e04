"""The decoder's first layer: looked-up rows, added up, against the product with one-hot rows: `python -m
benchmarks.decoder_input`.

Both in onnxruntime with one thread, a linear decoder of 784 outputs with random weights; medians in microseconds,
calls taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from dgrad_export.codec.session import open_session

LATENTS = ((20, 10), (1, 40))
BATCHES = (1, 16, 256)
OUTPUTS = 784

Weight = npt.NDArray[np.float32]


def product(n: int, k: int, weight: Weight) -> bytes:
    """`image = sigmoid(one_hot(code) @ weight.T + bias)`, as `dgrad export` writes it; `weight` is `[outputs, n*k]`."""
    nodes = [
        make_node("Unsqueeze", ["code", "last"], ["column"]),
        make_node("Equal", ["column", "values"], ["equal"]),
        make_node("Cast", ["equal"], ["one_hot"], to=TensorProto.FLOAT),
        make_node("Reshape", ["one_hot", "flat"], ["rows"]),
        make_node("Gemm", ["rows", "weight", "bias"], ["outputs"], transB=1),
    ]
    constants = {
        "last": np.array([-1]), "values": np.arange(k), "flat": np.array([-1, n * k]), "weight": weight, "bias": bias(),
    }  # fmt: skip
    return _decoder(n, nodes, constants)


def rows(n: int, k: int, weight: Weight) -> bytes:
    """`image = sigmoid(sum_i weight.T[k i + code_i] + bias)`."""
    nodes = [
        make_node("Add", ["code", "first"], ["row"]),
        make_node("Gather", ["weight", "row"], ["looked_up"]),
        make_node("ReduceSum", ["looked_up", "variables"], ["sum"], keepdims=0),
        make_node("Add", ["sum", "bias"], ["outputs"]),
    ]
    constants = {
        "first": k * np.arange(n), "weight": np.ascontiguousarray(weight.T), "variables": np.array([1]), "bias": bias(),
    }  # fmt: skip
    return _decoder(n, nodes, constants)


def bias() -> Weight:
    """A bias that is not zero."""
    return np.linspace(-1, 1, OUTPUTS, dtype=np.float32)


def _decoder(n: int, nodes: list[NodeProto], constants: dict[str, npt.NDArray[np.generic]]) -> bytes:
    code = make_tensor_value_info("code", TensorProto.INT64, ["batch", n])
    image = make_tensor_value_info("image", TensorProto.FLOAT, ["batch", OUTPUTS])
    initializers = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = make_graph([*nodes, make_node("Sigmoid", ["outputs"], ["image"])], "decoder", [code], [image], initializers)
    model = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def measure(n: int, k: int, batch: int, rounds: int) -> dict[str, float]:
    """Median microseconds of each form, which give the same images."""
    weight = np.random.default_rng(0).standard_normal((OUTPUTS, n * k), dtype=np.float32)
    sessions = {form.__name__: open_session(form(n, k, weight)) for form in (product, rows)}
    feed = {"code": np.random.default_rng(1).integers(k, size=(batch, n))}
    first, second = (session.run(None, feed)[0] for session in sessions.values())
    np.testing.assert_allclose(first, second, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args(arguments)
    print("| latent | batch | product with one-hot rows | looked-up rows | rows / product |\n|---|---|---|---|---|")
    for n, k in LATENTS:
        for batch in BATCHES:
            times = measure(n, k, batch, options.rounds)
            ratio = times["rows"] / times["product"]
            print(f"| {n}x{k} | {batch} | {times['product']:.0f} us | {times['rows']:.0f} us | {ratio:.2f} |")


if __name__ == "__main__":
    main()
