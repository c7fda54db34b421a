"""A QDQ file without what follows from the rest: zeros that the format implies, products that a runtime folds, names.

ONNX Runtime's quantizer writes 17 bytes for each output channel besides its weights. Of these go

* zero points that are all zero, of int32 biases and of a Conv's weights: `DequantizeLinear` implies them;
* the scale of a bias, where it is the product of the input's and the weights' scale bit for bit: a Mul of the two takes
  its place, which every runtime folds while it loads the model;
* half of what is left, the weights' scale and the bias, in layers large enough: see `narrow`.

That leaves about 4 bytes. A Gemm's weights keep their zero point, without which ONNX Runtime leaves the node in float.
Of the names go those that the quantizer made up: see `shorten_names`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.core.artifact import Facts
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.graph import graphs_of, opset_of
from onnxshrink.stages.narrow import Layer, narrow
from onnxshrink.stages.short_names import shorten_names

_LAYERS = ("Conv", "Gemm", "MatMul")
_SPLIT_BY_TENSOR = 13  # the opset from which Split takes its sizes as a tensor, and scales may be one a channel


def compact(model: onnx.ModelProto) -> Facts:
    """Take out of a QDQ model, in place, what follows from the rest.

    All but the rounding of scales to float16 leaves the outputs as they are, bit for bit. Where the graph has subgraphs
    (If, Loop, Scan), scales, biases and names stay, which may be read from there.

    Args:
        model: A QDQ model by ONNX Runtime's quantizer; any other is left as it is.

    Returns:
        How many ``zero_points`` and ``bias_scales`` went, what `narrow` did, how many tensors have ``short_names`` and
        the ``bytes_saved``.
    """
    before = model.ByteSize()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantizers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    zero_points = 0
    products: dict[str, onnx.NodeProto] = {}
    layers: list[Layer] = []
    for node in model.graph.node:
        if node.op_type not in _LAYERS or not all(name in dequantizers for name in node.input):
            continue
        weights = dequantizers[node.input[1]]
        if weights.input[0] not in tensors:
            continue
        if node.op_type == "Conv":
            zero_points += _omit_zero_point(weights, tensors)
        bias = dequantizers[node.input[2]] if len(node.input) > 2 else None
        if bias is None or bias.input[0] not in tensors or tensors[bias.input[0]].data_type != TensorProto.INT32:
            layers.append(Layer(weights.input[1], tied=bias is None))
            continue
        zero_points += _omit_zero_point(bias, tensors)
        factors = [dequantizers[node.input[0]].input[1], weights.input[1]]
        if _is_product(bias.input[1], factors, tensors):
            products[bias.input[1]] = helper.make_node("Mul", factors, [bias.input[1]])
        layers.append(Layer(weights.input[1], bias.input[0], tied=bias.input[1] in products))
    _write(model, products)
    facts: Facts = {"zero_points": zero_points, "bias_scales": len(products)}
    if len(list(graphs_of(model.graph))) == 1 and opset_of(model) >= _SPLIT_BY_TENSOR:
        facts |= narrow(model, layers) | {"short_names": shorten_names(model) if dequantizers else 0}
    return facts | {"bytes_saved": before - model.ByteSize()}


def _omit_zero_point(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> int:
    """Drop the zero point of a DequantizeLinear where it is zero throughout, which the node assumes; 1 if it went."""
    if len(node.input) < 3 or node.input[2] not in tensors or numpy_helper.to_array(tensors[node.input[2]]).any():
        return 0
    del node.input[2:]
    return 1


def _is_product(name: str, factors: list[str], tensors: dict[str, onnx.TensorProto]) -> bool:
    """Whether an initializer is the float32 product of two others, of the same shape and bit for bit."""
    if not all(part in tensors for part in (name, *factors)):
        return False
    value, *parts = (numpy_helper.to_array(tensors[part]) for part in (name, *factors))
    product: Array = np.multiply(*parts)
    return product.shape == value.shape and product.dtype == value.dtype and product.tobytes() == value.tobytes()


def _write(model: onnx.ModelProto, products: dict[str, onnx.NodeProto]) -> None:
    nodes = [*products.values(), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = Counter(name for node in nodes for name in node.input) + Counter(out.name for out in model.graph.output)
    has_bodies = any(a.g.node or a.graphs for node in nodes for a in node.attribute)
    kept = [t for t in model.graph.initializer if t.name not in products and (has_bodies or read[t.name])]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
