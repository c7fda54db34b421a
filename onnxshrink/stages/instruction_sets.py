"""What the 8-bit products of a graph, as ONNX Runtime runs it, ask of a processor, and where they are not exact.

ONNX Runtime chooses its kernels while it runs, down to those that every processor of the architecture has, so a graph
without a layout of its own asks for no instruction set; what an older one costs is speed or, on x86, saturation.

Source: Intel SDM, VPMADDUBSW; Arm ARM, SDOT and SMMLA; onnxruntime/core/mlas/lib/platform.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from onnxshrink.calibration.saturation import harmless_in_any_order
from onnxshrink.core.artifact import Facts
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.graph import graphs_of
from onnxshrink.verify.macs import attribute

_HOST_DOMAIN = "com.microsoft.nchwc"


class _Places(NamedTuple):
    """Which inputs of an operator say what it multiplies: the activation's zero point, the weights."""

    zero_point: int | None
    weights: tuple[int, ...]


# None: the operator finds its activations' ranges itself, and they are unsigned.
_PRODUCTS = {
    "ConvInteger": _Places(2, (1,)),
    "DynamicQuantizeLSTM": _Places(None, (1, 2)),
    "DynamicQuantizeMatMul": _Places(None, (1,)),
    "MatMulInteger": _Places(2, (1,)),
    "MatMulIntegerToFloat": _Places(4, (1,)),
    "QAttention": _Places(6, (1,)),
    "QGemm": _Places(2, (3,)),
    "QLinearConv": _Places(2, (3,)),
    "QLinearMatMul": _Places(2, (3,)),
}


def instruction_sets(model: onnx.ModelProto) -> Facts:
    """What the graph asks of a processor.

    Args:
        model: As ONNX Runtime runs it, with its weights.

    Returns:
        ``host_specific_nodes``, whose layout fits one width of vectors; ``integer_products``, how many there are of
        each pair of types (``u8s8``: unsigned activations, signed weights); ``may_saturate``, how many are not proven
        to be exact on x86 without VNNI; ``minimum``, ``x86`` and ``arm64``, the same in words.
    """
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    host_specific = sum(node.domain == _HOST_DOMAIN for node in nodes)
    products = list(_products(model))
    types = Counter(pair for pair, _ in products)
    saturating = sum(pair == "u8s8" and not exact for pair, exact in products)
    return {
        "host_specific_nodes": host_specific,
        "integer_products": dict(sorted(types.items())),
        "may_saturate": saturating,
        "minimum": "that of the processor the file was written on"
        if host_specific
        else "none beyond what ONNX Runtime itself needs: it chooses kernels while it runs",
        "x86": _on_x86(types, saturating),
        "arm64": _on_arm64(types),
    }


def _on_x86(types: Counter[str], saturating: int) -> str:
    if not types:
        return "no 8-bit products: only speed depends on the instruction set"
    if not types["u8s8"]:
        return "every 8-bit product is exact on any x86-64"
    if not saturating:
        return "every 8-bit product is exact on any x86-64: no two weights of a channel can saturate a 16-bit sum"
    return (
        f"{saturating} of {types.total()} 8-bit products may saturate where a processor has no VNNI; with VNNI "
        "(AVX-VNNI or AVX-512 VNNI) all are exact"
    )


def _on_arm64(types: Counter[str]) -> str:
    if not types:
        return "no 8-bit products: only speed depends on the instruction set"
    return "every 8-bit product is exact; fastest with sdot or smmla (ARMv8.2 and later)"


def _products(model: onnx.ModelProto) -> Iterator[tuple[str, bool]]:
    """Types and exactness (no two weights could saturate a 16-bit sum) of every 8-bit product."""
    for graph in graphs_of(model.graph):
        constants = {tensor.name: tensor for tensor in graph.initializer}
        ranged = {name for node in graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.output[:1]}
        for node in graph.node:
            places = _PRODUCTS.get(node.op_type)
            if places is None:
                continue
            weights = [constants[node.input[at]] for at in places.weights if node.input[at] in constants]
            activation = _activation(node, places, constants, ranged)
            sign = "u" if any(tensor.data_type == TensorProto.UINT8 for tensor in weights) else "s"
            exact = bool(weights) and all(
                harmless_in_any_order(_rows(node, numpy_helper.to_array(tensor)))
                for tensor in weights
                if tensor.data_type == TensorProto.INT8
            )
            yield f"{activation}8{sign}8", exact


def _activation(node: onnx.NodeProto, places: _Places, constants: dict[str, TensorProto], ranged: set[str]) -> str:
    if places.zero_point is None or node.input[0] in ranged:
        return "u"
    given = node.input[places.zero_point] if places.zero_point < len(node.input) else ""
    return "s" if given in constants and constants[given].data_type == TensorProto.INT8 else "u"


def _rows(node: onnx.NodeProto, weights: Array) -> NDArray[np.int8]:
    """``(M, K)``: the weights of each output channel."""
    if "Conv" in node.op_type or attribute(node, "transB", 0):
        return weights.reshape(len(weights), -1)
    return np.swapaxes(weights, -1, -2).reshape(-1, weights.shape[-2])
