"""Torch's functions as the ONNX operators that they become, for those who watch a network compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Torch functions by their names without underscores, and the ONNX operators that they become.
OPERATORS = {
    **{f"conv{rank}d": "Conv" for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": "ConvTranspose" for rank in (1, 2, 3)},
    "linear": "Gemm",
    "embedding": "Gather",
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm"), "MatMul"),
    **dict.fromkeys(("add", "radd", "iadd"), "Add"),
    **dict.fromkeys(("mul", "rmul", "imul"), "Mul"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "Concat"),
    **dict.fromkeys(("adaptive_avg_pool2d", "mean"), "GlobalAveragePool"),
    "avg_pool2d": "AveragePool",
    "softmax": "Softmax",
    "sigmoid": "Sigmoid",
    "leaky_relu": "LeakyRelu",
    "layer_norm": "LayerNormalization",
    "instance_norm": "InstanceNormalization",
    "batch_norm": "BatchNormalization",
}
HAS_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "Gather")
MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ONE_INPUT = (*HAS_WEIGHTS, "LayerNormalization", "InstanceNormalization", "BatchNormalization")
HAS_BIAS = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization")
FUSED = {"relu", "relu6", "hardtanh", "clamp", "clip", "batch_norm"}
# Questions about a tensor, which read none of its values.
QUESTIONS = {"get", "size", "dim", "numel", "stride", "len", "is_floating_point", "is_complex", "register_hook"}


def each_tensor(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with every tensor in its lists, tuples and dicts changed."""
    if isinstance(value, Mapping):
        copy = dict(value)
        copy.update({key: each_tensor(item, change) for key, item in value.items()})
        return copy
    if type(value) in (list, tuple):
        return type(value)(each_tensor(item, change) for item in value)
    return change(value)
