"""Shrink a PyTorch or ONNX model for the device it must run on, and prove that it still works."""

__version__ = "0.1.0"
