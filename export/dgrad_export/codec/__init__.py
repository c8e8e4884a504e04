"""Running exported models: numpy and onnxruntime."""
