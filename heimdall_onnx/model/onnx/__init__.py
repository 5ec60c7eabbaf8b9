"""The model's ONNX file: exported, checked, validated, read, told from another."""
