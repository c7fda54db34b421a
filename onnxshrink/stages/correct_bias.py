"""Bias correction: what rounding the weights adds to a node's mean output is taken out of its bias.

Rounded weights shift the mean of each output channel by ``E[conv(x, rounded - weights)]``. The shift is a constant, so
a bias cancels it: no node, no byte and no microsecond more. It is measured by running the difference of the weights as
a second node on the float model's own activations, so padding, strides and groups are taken as they are.

Source: the idea and the name from Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.2; measured on samples, as in their appendix D, in place of batch-norm statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.core.artifact import Facts
from onnxshrink.core.tensors import Array
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session

_OP_TYPES = ("Conv", "Gemm")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A node whose weights were rounded.

    Attributes:
        node: A Conv, or a Gemm whose factors are 1.
        weights: Its float weights.
        error: Rounded less float weights, of the same shape.
        bias: Its float bias, ``(channels,)``; zeros where it has none.
    """

    node: onnx.NodeProto
    weights: Array
    error: Array
    bias: Array


def correct_bias(
    model: onnx.ModelProto, quantized: onnx.ModelProto, reader: Reader, *, name: str = "model"
) -> tuple[onnx.ModelProto, Facts]:
    """A copy of ``model`` whose biases make up for the weights that ``quantized`` has.

    Args:
        model: A prepared float model; kept as it is.
        quantized: What ONNX Runtime's static quantizers made of it, of either format.
        reader: Calibration samples.
        name: What to call the model in messages.

    Returns:
        The corrected float model, to be quantized with the same settings, and facts: how many nodes were corrected,
        the largest shift taken out and why the others were left.
    """
    layers, declined = _rounded_layers(model, quantized)
    shifts = _mean_shifts(model, layers, reader, name=name) if layers else {}
    corrected = onnx.ModelProto()
    corrected.CopyFrom(model)
    nodes = {node.name: node for node in corrected.graph.node}
    taken = {tensor.name for tensor in model.graph.initializer}
    taken |= {output for node in model.graph.node for output in node.output}
    for layer in layers:
        bias = f"{layer.node.name}_corrected_bias"
        while bias in taken:
            bias += "_"
        taken.add(bias)
        value = (layer.bias - shifts[layer.node.name]).astype(np.float32)
        corrected.graph.initializer.append(numpy_helper.from_array(value, bias))
        node = nodes[layer.node.name]
        inputs = [*node.input[:2], bias]
        del node.input[:]
        node.input.extend(inputs)
    _drop_unread(corrected)
    largest = max((float(np.abs(shift).max()) for shift in shifts.values()), default=0.0)
    return corrected, {"nodes": len(layers), "largest_shift": largest, "declined": declined}


def _rounded_layers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> tuple[list[_Layer], dict[str, str]]:
    """The nodes to correct, and the name of each other Conv and Gemm with rounded weights and why it is left."""
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    integers = {tensor.name: tensor for tensor in quantized.graph.initializer}  # and what stays in float
    still_float = {n.name for n in quantized.graph.node if n.op_type in _OP_TYPES and n.input[1] in integers}
    layers: list[_Layer] = []
    declined: dict[str, str] = {}
    for node in model.graph.node:
        # The quantizers call a tensor's 8-bit values after it, in both formats.
        if (
            node.op_type not in _OP_TYPES
            or node.name in still_float
            or f"{node.input[1]}_quantized" not in integers
            or node.input[1] not in floats
        ):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weights = numpy_helper.to_array(floats[node.input[1]])
        axis = 1 if node.op_type == "Gemm" and not attributes.get("transB", 0) else 0
        has_bias = len(node.input) > 2 and node.input[2]
        bias = _constant(floats, node.input[2]) if has_bias else np.zeros(weights.shape[axis], np.float32)
        if bias is None or bias.shape != (weights.shape[axis],):
            declined[node.name] = "its bias is computed, or not one number for each output channel"
        elif attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            declined[node.name] = "it scales its product or its bias"
        else:
            layers.append(_Layer(node, weights, _dequantized(integers, node.input[1], axis) - weights, bias))
    return layers, declined


def _mean_shifts(
    model: onnx.ModelProto, layers: list[_Layer], reader: Reader, *, name: str
) -> dict[str, NDArray[np.float64]]:
    """Name of each layer's node to its mean output through the weights' error, ``(channels,)`` float64."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    for layer in layers:
        stem = f"{layer.node.name}#shift"  # a mark that no exporter writes
        node = onnx.NodeProto()
        node.CopyFrom(layer.node)
        del node.input[2:]
        pooled = node.op_type == "Conv"  # a number per channel comes out of the graph, not the activation
        node.name, node.input[1], node.output[0] = stem, f"{stem}_weights", f"{stem}_map" if pooled else stem
        shown.graph.initializer.append(numpy_helper.from_array(layer.error, f"{stem}_weights"))
        shown.graph.node.append(node)
        if pooled:
            shown.graph.node.append(helper.make_node("GlobalAveragePool", [f"{stem}_map"], [stem], name=f"{stem}_pool"))
        shown.graph.output.append(helper.make_tensor_value_info(stem, onnx.TensorProto.FLOAT, None))
    session = Session(shown.SerializeToString(), name=name)
    sums = {layer.node.name: np.zeros(layer.bias.shape, np.float64) for layer in layers}
    rows = dict.fromkeys(sums, 0)
    for batch in reader:
        values = session.run(batch)
        for node_name, total in sums.items():
            per_row = values[f"{node_name}#shift"].reshape(-1, total.size)
            np.add(total, per_row.sum(axis=0, dtype=np.float64), out=total)
            rows[node_name] += len(per_row)
    return {node_name: total / max(rows[node_name], 1) for node_name, total in sums.items()}


def _dequantized(integers: Mapping[str, onnx.TensorProto], weights: str, axis: int) -> Array:
    """The float32 values that 8-bit weights stand for."""
    values, scale, zero_point = (
        numpy_helper.to_array(integers[f"{weights}_{part}"]) for part in ("quantized", "scale", "zero_point")
    )
    if scale.size > 1:
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    real: Array = (values.astype(np.float32) - zero_point.astype(np.float32)) * scale.astype(np.float32)
    return real


def _constant(floats: Mapping[str, onnx.TensorProto], name: str) -> Array | None:
    return numpy_helper.to_array(floats[name]) if name in floats else None


def _drop_unread(model: onnx.ModelProto) -> None:
    """Initializers that nothing reads any more go; a model with subgraphs keeps all, which may be read from there."""
    if any(a.g.node or a.graphs for node in model.graph.node for a in node.attribute):
        return
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
