"""The configuration of a graph in a Triton model repository, as text.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

from typing import Any

DATA_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def config_text(name: str, entry: dict[str, Any], largest_batch: int) -> str:
    """A `config.pbtxt` with dynamic batching.

    Args:
        name: the model's name, which is its directory's.
        entry: the graph's entry in the manifest: names, shapes and data types of its inputs and outputs.
        largest_batch: how many examples may run at once.
    """
    lines = [
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {largest_batch}",
        *(_tensor("input", tensor) for tensor in entry["inputs"]),
        *(_tensor("output", tensor) for tensor in entry["outputs"]),
        "dynamic_batching {}",
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, tensor: dict[str, Any]) -> str:
    """One tensor without its batch axis. Triton takes a single number as `[1]`, so that is reshaped."""
    shape = tensor["shape"][1:]
    lines = [f'name: "{tensor["name"]}"', f"data_type: {DATA_TYPES[tensor['dtype']]}", f"dims: {shape or [1]}"]
    if not shape:
        lines.append("reshape { shape: [] }")
    return "\n".join([f"{kind} {{", *(f"  {line}" for line in lines), "}"])
