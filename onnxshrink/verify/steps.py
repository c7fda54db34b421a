"""The quantization step of a model's outputs: the unit in which rounding is off by at most a half."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxshrink.core.tensors import Array
from onnxshrink.runtime.graph import constant_value
from onnxshrink.verify.causes import MOVES

_SEVERAL = {"Concat", "Expand"}  # moves that bring several inputs together, or none of a quantized one


def output_steps(model: onnx.ModelProto) -> dict[str, float]:
    """The step of each output that ends in a DequantizeLinear, through nodes that only move numbers.

    Args:
        model: Any model.

    Returns:
        Output name to the scale of its DequantizeLinear, in the output's own unit; 1 for outputs that are quantized
        numbers themselves. Left out are outputs that are not quantized, and those with several scales.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants |= {node.output[0]: value for node in model.graph.node if (value := constant_value(node)) is not None}
    makers = {name: node for node in model.graph.node for name in node.output}
    steps = {value.name: _step(value.name, makers, constants) for value in model.graph.output}
    return {name: step for name, step in steps.items() if step is not None}


def _step(name: str, makers: dict[str, onnx.NodeProto], constants: dict[str, Array]) -> float | None:
    node = makers.get(name)
    while node is not None and node.op_type in MOVES - _SEVERAL:
        node = makers.get(node.input[0])
    if node is None or node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return None
    if node.op_type == "QuantizeLinear":
        return 1.0
    scale = constants.get(node.input[1])
    return float(np.asarray(scale).item()) if scale is not None and scale.size == 1 else None
