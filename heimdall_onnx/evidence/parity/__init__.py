"""Whether the ONNX model answers what the PyTorch model answers, and where it departs."""
