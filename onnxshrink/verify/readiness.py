"""What would keep a model from quantizing well, each with its fix: read off the file before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.contents import quantization_of
from onnxshrink.runtime.graph import PROTOBUF_LIMIT_BYTES, constant_value, opset_of

LOST_BITS = 3.0
"""Bits that half of the channels may lose to the largest one before it is told: of 8, five remain."""

_PER_CHANNEL_OPSET = 13
_NAMED = 3
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Something that stands in the way.

    Attributes:
        kind: A short name, equal for equal things: ``batch normalization``.
        what: What is the case, with names.
        fix: What to do about it.
        count: How many nodes, tensors or axes it is about.
    """

    kind: str
    what: str
    fix: str
    count: int


def find_hindrances(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> tuple[Hindrance, ...]:
    """Look for what is known to cost accuracy or speed in int8.

    Args:
        model: The model with its weights.
        inputs: Its inputs.

    Returns:
        The gravest first; empty where nothing stands in the way. Of a quantized model only that it is quantized.
    """
    quantization = quantization_of(model)
    found = []
    if quantization.formats:
        how = ", ".join(quantization.formats)
        fix = "quantize the float32 model that it was made from"
        return (Hindrance("quantized", f"the model is quantized already: {how}", fix, 1),)
    if (opset := opset_of(model)) < _PER_CHANNEL_OPSET:
        what = f"opset {opset} has no scales per channel for QuantizeLinear"
        fix = "export with opset 17 or later, or onnx.version_converter.convert_version(model, 17)"
        found.append(Hindrance("opset", what, fix, 1))
    found += [*_batch_norms(model.graph), *_pooling(model.graph), *_outliers(model.graph)]
    found += [*_unshaped(model), *_dynamic(inputs), *_bodies(model.graph)]
    return tuple(found)


def _batch_norms(graph: onnx.GraphProto) -> Iterator[Hindrance]:
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    foldable = [node for node in norms if made_by.get(node.input[0]) in _OUTPUT_AXIS]
    if foldable:
        what = f"{_named(foldable)}: batch normalization that is not folded is an island of float"
        yield Hindrance("batch normalization", what, "add {kind: optimize} before quantizing", len(foldable))
    others = [node for node in norms if node not in foldable]
    if others:
        what = f"{_named(others)}: batch normalization that follows no convolution or product runs in float"
        fix = "put the normalization right behind a convolution in the network"
        yield Hindrance("batch normalization", what, fix, len(others))


def _pooling(graph: onnx.GraphProto) -> Iterator[Hindrance]:
    """ReduceMean over height and width: ONNX Runtime has no integer kernel for it, and one for GlobalAveragePool."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 1}
    constants |= {node.output[0]: value for node in graph.node if (value := constant_value(node)) is not None}
    pools = []
    for node in graph.node:
        if node.op_type != "ReduceMean":
            continue
        axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"), None)
        if axes is None and len(node.input) > 1 and node.input[1] in constants:
            axes = [int(axis) for axis in np.ravel(constants[node.input[1]])]
        if axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]:
            pools.append(node)
    if pools:
        what = f"{_named(pools)}: ReduceMean over height and width has no integer kernel"
        fix = "add {kind: optimize} before quantizing: it writes GlobalAveragePool"
        yield Hindrance("reduce mean", what, fix, len(pools))


def _outliers(graph: onnx.GraphProto) -> Iterator[Hindrance]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    lost = []
    for node in graph.node:
        axis = _OUTPUT_AXIS.get(node.op_type)
        if axis is None or len(node.input) < 2 or node.input[1] not in tensors:
            continue
        weights = numpy_helper.to_array(tensors[node.input[1]])
        if weights.ndim < 2 or weights.dtype.kind != "f":
            continue
        if node.op_type == "Gemm" and any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            axis = 0
        bits = lost_bits(weights, axis)
        if bits > LOST_BITS:
            lost.append((bits, node))
    if lost:
        lost.sort(key=lambda pair: (-pair[0], pair[1].name))
        names = _named([node for _, node in lost])
        what = (
            f"{names}: with one scale for the whole weight half of the channels lose {LOST_BITS:.0f} of 8 bits or more "
            f"({lost[0][0]:.1f} at worst) to the largest one"
        )
        fix = "granularity: per_channel, or {kind: equalize} before quantizing"
        yield Hindrance("outlier channels", what, fix, len(lost))


def lost_bits(weights: NDArray[Any], axis: int) -> float:
    """Bits that the median channel loses when one scale serves all: log2 of the largest range by its own.

    Args:
        weights: Of any shape.
        axis: The output channels.

    Returns:
        At least 0; 0 for a single channel or weights that are all zero.
    """
    channels = np.abs(np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)).max(axis=1)
    channels = channels[channels > 0]
    return log2(float(channels.max() / np.median(channels))) if channels.size else 0.0


def _unshaped(model: onnx.ModelProto) -> Iterator[Hindrance]:
    if model.ByteSize() >= PROTOBUF_LIMIT_BYTES:
        return  # onnx infers nothing of it, and says nothing
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name for value in inferred.value_info if value.type.tensor_type.HasField("shape")}
    known |= {value.name for value in (*inferred.input, *inferred.output)}
    missing = [name for node in model.graph.node if node.domain in ("", "ai.onnx") for name in node.output]
    missing = [name for name in missing if name and name not in known]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"the shape of {missing[0]!r}{more} cannot be inferred"
        fix = "add {kind: optimize}, or run python -m onnxruntime.tools.symbolic_shape_infer"
        yield Hindrance("shapes", what, fix, len(missing))


def _dynamic(inputs: Sequence[TensorSpec]) -> Iterator[Hindrance]:
    axes = [f"{dim} of {spec.name!r}" for spec in inputs for dim in spec.shape[1:] if isinstance(dim, str)]
    if axes:
        what = f"{', '.join(axes[:_NAMED])}: axes of any length beside the batch"
        fix = (
            "calibrate on the lengths that occur; for phones fix them: python -m "
            "onnxruntime.tools.make_dynamic_shape_fixed"
        )
        yield Hindrance("dynamic axes", what, fix, len(axes))


def _bodies(graph: onnx.GraphProto) -> Iterator[Hindrance]:
    nodes = [node for node in graph.node if node.op_type in ("If", "Loop", "Scan")]
    if nodes:
        what = f"{_named(nodes)}: what lies within If, Loop and Scan stays in float"
        yield Hindrance("control flow", what, "export without it: trace, or unroll the loop", len(nodes))


def _named(nodes: Sequence[onnx.NodeProto]) -> str:
    names = ", ".join(repr(node.name or node.output[0]) for node in nodes[:_NAMED])
    return names + (f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else "")
