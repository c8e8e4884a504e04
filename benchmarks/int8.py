"""A decoder in floats, with int8 weights, and as onnxruntime's dynamic quantisation makes it: `python -m
benchmarks.int8 MODEL ...`.

Each MODEL is what `dgrad export` wrote without `--int8`, of a model without Gaussian variables. Medians in
microseconds, one thread, calls taking turns; how much an image differs from the float one (root mean square), and
how much when it is alone from when it has 255 others beside it (largest).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

from dgrad_export import Codec
from dgrad_export.codec.session import open_session
from dgrad_export.write.int8 import quantize

BATCHES = (1, 16, 256)


def dynamic(decoder: Path) -> bytes:
    """onnxruntime's dynamic quantisation, per channel: a scale of the activations for the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, out = Path(folder) / "prepared.onnx", Path(folder) / "out.onnx"
        quant_pre_process(decoder, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, out, per_channel=True, weight_type=QuantType.QInt8)
        return out.read_bytes()


def measure(model: Path, rounds: int) -> None:
    """Print a table for one export."""
    whole = (model / "decoder.onnx").read_bytes()
    graphs = {"floats": whole, "`--int8 decoder`": quantize(whole), "quantize_dynamic": dynamic(model / "decoder.onnx")}
    sessions = {name: open_session(graph) for name, graph in graphs.items()}
    codes = Codec(model).sample_codes(max(BATCHES), seed=0)
    images = {name: session.run(["image"], {"code": codes})[0] for name, session in sessions.items()}
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for size in BATCHES for name in sessions}
    for size in BATCHES:
        for _ in range(rounds):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(["image"], {"code": codes[:size]})
                times[name, size].append(1e6 * (time.perf_counter() - start))
    print(f"\n{model}\n\n| decoder | bytes | batch {' | '.join(map(str, BATCHES))} | from floats | alone or not |")
    print("|---" * (4 + len(BATCHES)) + "|")
    for name, graph in graphs.items():
        medians = " | ".join(f"{statistics.median(times[name, size]):.0f} us" for size in BATCHES)
        error = np.sqrt(np.mean((images[name] - images["floats"]) ** 2))
        alone = [sessions[name].run(["image"], {"code": codes[i : i + 1]})[0] for i in range(len(codes))]
        largest = np.abs(np.concatenate(alone) - images[name]).max()
        print(f"| {name} | {len(graph):,} | {medians} | {error:.1e} | {largest:.1e} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    for model in arguments.models:
        measure(model, arguments.rounds)


if __name__ == "__main__":
    main()
