"""The only wrappers of onnx models, ONNX Runtime sessions and torch networks."""
