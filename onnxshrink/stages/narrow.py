"""Weights' scales in float16 and biases in int16: two tensors that hold those of all layers, and their exceptions.

A runtime wants float32 scales and int32 biases, and folds what makes them while it loads the model::

    float16 or int16, all layers ─▶ Cast ─▶ ScatterElements ─▶ Split ─▶ one tensor for each layer
                             exceptions, where they are ──┘

An exception is a value that 16 bits do not hold: a scale below float16's normal numbers, a bias beyond int16. Biases
keep their values. A scale is rounded by at most one part in 2,048, so the largest weight moves by 1/16 of a step
(127 / 2,048) where quantization itself moves weights by up to 1/2; the layer's bias is expressed in the new scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.core.artifact import Facts
from onnxshrink.core.tensors import Array

_NODES_BYTES = 256  # what the nodes that give the tensors back cost, about
_EXCEPTION_BYTES = 8  # an int32 index and a value of 4 bytes
_SAVED_BYTES = 2  # of 4, for each value
_INT32 = np.iinfo(np.int32)
_FLOAT16 = np.finfo(np.float16)


@dataclass(frozen=True, slots=True)
class Layer:
    """The constants of a quantized Conv, Gemm or MatMul, by the names of their initializers.

    Attributes:
        scale: The weights' scale, float32.
        bias: The int32 bias, if it has one.
        tied: Whether the bias's scale is made of the weights' in the graph, and follows when that changes.
    """

    scale: str
    bias: str | None = None
    tied: bool = True


def narrow(model: onnx.ModelProto, layers: Sequence[Layer]) -> Facts:
    """Store scales and biases in 16 bits, in place, where that makes the file smaller.

    Args:
        model: A QDQ model of opset 13 or later, without subgraphs.
        layers: Its layers; a name may stand in several.

    Returns:
        How many ``float16_scales`` and ``int16_biases`` there are now, and the ``largest_scale_change`` as a ratio.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = _values(tensors, [layer.scale for layer in layers], TensorProto.FLOAT)
    for layer in layers:
        if layer.bias is not None and not layer.tied:
            scales.pop(layer.scale, None)
    biases = _values(tensors, [layer.bias for layer in layers if layer.bias is not None], TensorProto.INT32)
    rounded = {name: _rounded(name, value, layers, biases) for name, value in scales.items()}
    rounded = _worthwhile(rounded, np.dtype(np.float16))
    moved: dict[str, Array] = {}
    for layer in layers:
        if layer.bias is not None and layer.bias in biases and layer.scale in rounded:
            moved[layer.bias] = _in_scale(biases[layer.bias], scales[layer.scale], rounded[layer.scale])
            tensors[layer.bias].CopyFrom(numpy_helper.from_array(moved[layer.bias], layer.bias))
    biases |= moved
    narrow_biases = _worthwhile(biases, np.dtype(np.int16))
    changes = [float(np.abs(value / scales[name].astype(np.float64) - 1).max()) for name, value in rounded.items()]
    return {
        "float16_scales": _store(model, rounded, np.dtype(np.float16), "scales"),
        "int16_biases": _store(model, narrow_biases, np.dtype(np.int16), "biases"),
        "largest_scale_change": max(changes, default=0.0),
    }


def _values(tensors: Mapping[str, onnx.TensorProto], names: Sequence[str], data_type: int) -> dict[str, Array]:
    """The vectors among the initializers ``names``, each once."""
    found = {name: tensors[name] for name in names if name in tensors}
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in found.items()
        if tensor.data_type == data_type and len(tensor.dims) == 1
    }


def _rounded(name: str, scale: Array, layers: Sequence[Layer], biases: Mapping[str, Array]) -> Array:
    """A scale whose values are float16's where those are normal numbers and every bias fits into int32 with them.

    Args:
        name: The scale's.
        scale: ``(channels,)`` float32, positive.
        layers: All layers.
        biases: ``(channels,)`` int32 each.
    """
    normal = (scale >= _FLOAT16.smallest_normal) & (scale <= _FLOAT16.max)
    rounded = np.where(normal, scale, 1).astype(np.float16).astype(np.float32)
    for layer in layers:
        if layer.scale == name and layer.bias is not None and layer.bias in biases:
            moved = biases[layer.bias] * (scale.astype(np.float64) / rounded)
            normal &= (moved > _INT32.min) & (moved < _INT32.max)
    return np.where(normal, rounded, scale)


def _in_scale(bias: Array, old: Array, new: Array) -> NDArray[np.int32]:
    """The int32 bias that stands for the same numbers in a new scale, to the nearest step."""
    return np.rint(bias * (old.astype(np.float64) / new)).astype(np.int32)


def _narrowed(value: Array, dtype: np.dtype[np.generic]) -> tuple[Array, NDArray[np.int32]]:
    """A tensor in ``dtype``, and the places of the values that it cannot hold, where it is 0."""
    with np.errstate(over="ignore"):
        small = value.astype(dtype)
    places = np.flatnonzero(small.astype(value.dtype) != value).astype(np.int32)
    small[places] = 0
    return small, places


def _worthwhile(values: Mapping[str, Array], dtype: np.dtype[np.generic]) -> dict[str, Array]:
    """Those that are smaller in 16 bits with their exceptions; none where all of them do not pay for the nodes."""
    saved = {
        name: _SAVED_BYTES * value.size - _EXCEPTION_BYTES * _narrowed(value, dtype)[1].size
        for name, value in values.items()
    }
    chosen = {name: values[name] for name, count in saved.items() if count > 0}
    return chosen if sum(saved[name] for name in chosen) > _NODES_BYTES else {}


def _store(model: onnx.ModelProto, values: Mapping[str, Array], dtype: np.dtype[np.generic], stem: str) -> int:
    """Replace initializers by parts of one tensor; the number of values that are in 16 bits now."""
    if not values:
        return 0
    taken = {tensor.name for tensor in model.graph.initializer}
    taken |= {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in model.graph.input}
    while any(name.startswith(stem) for name in taken):
        stem += "_"
    wide = np.concatenate(list(values.values()))
    small, places = _narrowed(wide, dtype)
    constants = {f"{stem}_16": small, f"{stem}_sizes": np.array([value.size for value in values.values()], np.int64)}
    parts = f"{stem}_wide"
    nodes = [helper.make_node("Cast", [f"{stem}_16"], [parts], to=helper.np_dtype_to_tensor_dtype(wide.dtype))]
    if places.size:
        constants |= {f"{stem}_places": places, f"{stem}_exceptions": wide[places]}
        inputs = [parts, f"{stem}_places", f"{stem}_exceptions"]
        parts = f"{stem}_all"
        nodes.append(helper.make_node("ScatterElements", inputs, [parts]))
    nodes.append(helper.make_node("Split", [parts, f"{stem}_sizes"], list(values)))
    _put_first(model, nodes, constants, replaced=values)
    return int(wide.size - places.size)


def _put_first(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    *,
    replaced: Mapping[str, Array],
) -> None:
    """Put nodes at the head of the graph, and initializers in the place of those that the nodes make."""
    graph = model.graph
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(value, name) for name, value in constants.items())])
