"""Checking an export on disk: numpy, onnx and onnxruntime."""
