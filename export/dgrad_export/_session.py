"""Opening an ONNX model in onnxruntime, on the CPU and without noise. May import onnxruntime only."""

from __future__ import annotations

import onnxruntime


def open_session(model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session for a serialised model, with `threads` threads inside each operator (0: as many as there are cores)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What fails raises; the same again on stderr helps nobody.
    options.log_severity_level = 4
    onnxruntime.disable_telemetry_events()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
