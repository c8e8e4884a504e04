"""Writing trained models as ONNX: torch and onnx."""
