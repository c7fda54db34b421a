"""What a quantized model stores its tensors with, beside the values they have: the pictures of its grids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxshrink.calibration.health import share_outside
from onnxshrink.calibration.histogram import equal_edges, histogram
from onnxshrink.calibration.squared_error import SquaredError
from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics
from onnxshrink.core.tensors import Array
from onnxshrink.verify.macs import attribute

MAX_TENSORS = 24
"""Tensors that a report shows of one model, the worst first."""

N_BINS = 48
_DIGITS = 5
_EIGHT_BITS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True, slots=True)
class Stored:
    """An 8-bit tensor of a graph.

    Attributes:
        name: The float tensor that it stands for.
        kind: A constant or not.
        scale: ``()``, or ``(n,)`` along ``axis``; float64.
        zero_point: The same shape, int64.
        axis: Where there are several scales.
        integers: A weight's values; None of an activation.
        bounds: Least and greatest integer of its type.
    """

    name: str
    kind: Literal["weight", "activation"]
    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    axis: int
    integers: Array | None
    bounds: tuple[int, int]

    @property
    def lo(self) -> NDArray[np.float64]:
        """Least value that each scale's grid holds, of the shape of ``scale``."""
        return self.scale * (self.bounds[0] - self.zero_point)

    @property
    def hi(self) -> NDArray[np.float64]:
        """Greatest value, likewise."""
        return self.scale * (self.bounds[1] - self.zero_point)

    def along(self, values: NDArray[np.float64], ndim: int) -> NDArray[np.float64]:
        """One value for each scale, in a shape that broadcasts against the tensor."""
        shape = [1] * ndim
        if values.ndim:
            shape[self.axis] = -1
        return values.reshape(shape)


def range_details(
    model: onnx.ModelProto, before: onnx.ModelProto | None, statistics: Mapping[str, TensorStatistics]
) -> dict[str, dict[str, Any]]:
    """The tensors of a quantized model that lose most by their grids, at most `MAX_TENSORS`, as plain JSON.

    Weights are compared with those before quantization; where these are not found by name, only what the integers stand
    for is shown. Activations are those that calibration has observed. Four-bit weights are left out.

    Args:
        model: The quantized model.
        before: The float model that it was made from, for its weights.
        statistics: What calibration has observed, by tensor.

    Returns:
        By tensor, the lowest SQNR first: ``kind``; ``edges`` of equal bins and ``counts`` of the float values;
        ``lo`` and ``hi``, the ends of what the grid holds, over all channels; ``scale``, the largest, and ``scales``,
        how many; ``clipped_ratio``, the share of the values beyond the grid; ``sqnr_db`` of storing them, None for
        no error or no signal. Numbers have five digits.
    """
    weights = {t.name: t for t in before.graph.initializer if t.data_type in _FLOATS} if before is not None else {}
    names = _weight_names(model, before) | _absorbed(model, before) if before is not None else {}
    found: dict[str, dict[str, Any]] = {}
    for stored in stored_tensors(model):
        name = names.get(stored.name, stored.name)
        if name in found:
            continue
        if stored.integers is not None:
            found[name] = _weight(stored, weights.get(name))
        elif name in statistics and statistics[name].size and statistics[name].is_finite:
            found[name] = _activation(stored, statistics[name])
    worst = sorted(found, key=lambda name: (_order(found[name]["sqnr_db"]), -found[name]["clipped_ratio"], name))
    return {name: found[name] for name in worst[:MAX_TENSORS]}


def stored_tensors(model: onnx.ModelProto) -> Iterator[Stored]:
    """The 8-bit tensors at a scale and a zero point, in QDQ and in QOperator form, in the order of the graph.

    Tensors whose scales are those of blocks are left out.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    widened = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    triples = [triple for node in model.graph.node for triple in _triples(node, constants, widened)]
    zero_points = {zero for _, _, _, zero in triples}
    for node, name, scale_name, zero_name in triples:
        if name in zero_points or (name in constants and constants[name].data_type not in _EIGHT_BITS):
            continue
        scale = numpy_helper.to_array(constants[scale_name]).astype(np.float64).squeeze()
        zero = np.asarray(numpy_helper.to_array(constants[zero_name]) if zero_name else np.zeros((), np.int8))
        if scale.ndim > 1 or not scale.size or attribute(node, "block_size", 0):
            continue
        is_weight = name in constants
        dtype = zero.dtype if zero_name else numpy_helper.to_array(constants[name]).dtype
        integers = numpy_helper.to_array(constants[name]) if is_weight else None
        axis = _axis(node)
        if integers is not None and scale.size > 1:
            if not -integers.ndim <= axis < integers.ndim or integers.shape[axis] != scale.size:
                continue  # an operator that lays its weights out in its own way
            axis %= integers.ndim
        yield Stored(
            _float_name(sources.get(name, name)),
            "weight" if is_weight else "activation",
            scale,
            np.broadcast_to(zero.astype(np.int64).squeeze(), scale.shape),
            axis,
            integers,
            (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)),
        )


def _axis(node: onnx.NodeProto) -> int:
    """Where several scales lie: as DequantizeLinear says, along a convolution's outputs, along a product's columns.

    The columns of weights that are transposed are rows.
    """
    if node.op_type == "DequantizeLinear":
        return int(attribute(node, "axis", 1))
    return 0 if "Conv" in node.op_type or attribute(node, "transB", 0) else -1


def _triples(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], widened: Mapping[str, str]
) -> Iterator[tuple[onnx.NodeProto, str, str, str]]:
    """A node's inputs that are a tensor, its scale and its zero point, which DequantizeLinear may leave out."""
    names = list(node.input)
    if node.op_type == "DequantizeLinear" and (len(names) == 2 or not names[2]):
        scale = widened.get(names[1], names[1])
        if scale in constants and names[0] in constants:
            yield node, names[0], scale, ""
        return
    for name, read, zero in zip(names, names[1:], names[2:], strict=False):
        scale = widened.get(read, read)
        if name and scale in constants and zero in constants:
            is_scale, is_zero = constants[scale].data_type in _FLOATS, constants[zero].data_type in _EIGHT_BITS
            if is_scale and is_zero:
                yield node, name, scale, zero


def _float_name(name: str) -> str:
    return name.removesuffix("_QuantizeLinear_Input").removesuffix("_quantized")


def _absorbed(model: onnx.ModelProto, before: onnx.ModelProto) -> dict[str, str]:
    """Float tensor to what a Relu or Clip makes of it, where the grid has taken in the node: it stores that."""
    made = {name for node in model.graph.node for name in node.output}
    readers = Counter(name for node in before.graph.node for name in node.input)
    taken = [node for node in before.graph.node if node.op_type in ("Relu", "Clip") and node.output[0] not in made]
    return {
        node.input[0]: node.output[0]
        for node in taken
        if readers[node.input[0]] == 1 and f"{node.output[0]}_quantized" not in made
    }


def _weight_names(model: onnx.ModelProto, before: onnx.ModelProto) -> dict[str, str]:
    """Integer constant to the float one that the node of the same name reads in its place: `compact` renames them."""
    nodes = {node.name: node for node in before.graph.node if node.name}
    integers = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        integers[name]: nodes[node.name].input[place]
        for node in model.graph.node
        if node.name in nodes
        for place, name in enumerate(node.input)
        if name in integers and place < len(nodes[node.name].input)
    }


def _weight(stored: Stored, tensor: onnx.TensorProto | None) -> dict[str, Any]:
    assert stored.integers is not None  # noqa: S101  # asked for weights only
    ndim = stored.integers.ndim
    scale, lo, hi = (stored.along(values, ndim) for values in (stored.scale, stored.lo, stored.hi))
    restored = (stored.integers.astype(np.float64) - stored.along(stored.zero_point.astype(np.float64), ndim)) * scale
    exact = restored
    if tensor is not None and tuple(tensor.dims) == stored.integers.shape:
        exact = numpy_helper.to_array(tensor).astype(np.float64)
    clipped = float(((exact > hi + scale / 2) | (exact < lo - scale / 2)).mean()) if exact.size else 0.0
    edges = equal_edges(float(exact.min(initial=0)), float(exact.max(initial=0)), N_BINS)
    counts = np.histogram(exact, edges)[0]
    noise = float(np.square(exact - restored).sum()) if exact is not restored else math.nan
    return _as_json(stored, edges, counts, clipped, _decibels(float(np.square(exact).sum()), noise))


def _activation(stored: Stored, statistics: TensorStatistics) -> dict[str, Any]:
    lo, hi = float(stored.lo.min()), float(stored.hi.max())
    edges = equal_edges(min(float(statistics.lo), 0.0), max(float(statistics.hi), 0.0), N_BINS)
    noise = SquaredError.of(statistics).on(min(lo, 0.0), max(hi, 0.0)) if lo < hi else math.nan
    middles = (MAGNITUDE_EDGES[:-1] + MAGNITUDE_EDGES[1:]) / 2
    signal = sum(float(np.dot(counts, np.square(middles))) for counts in statistics.side_counts())
    margin = float(stored.scale.max()) / 2
    clipped = share_outside(statistics, (lo - margin, hi + margin))
    return _as_json(stored, edges, histogram(statistics, edges), clipped, _decibels(signal, noise))


def _decibels(signal: float, noise: float) -> float | None:
    return round(10 * math.log10(signal / noise), 2) if noise > 0 and 0 < signal < math.inf else None


def _as_json(
    stored: Stored, edges: NDArray[np.float64], counts: NDArray[Any], clipped: float, sqnr_db: float | None
) -> dict[str, Any]:
    return {
        "kind": stored.kind,
        "edges": [_short(edge) for edge in edges],
        "counts": counts.tolist(),
        "lo": _short(stored.lo.min()),
        "hi": _short(stored.hi.max()),
        "scale": _short(stored.scale.max()),
        "scales": int(stored.scale.size),
        "clipped_ratio": _short(clipped),
        "sqnr_db": sqnr_db,
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _order(decibels: float | None) -> float:
    return math.inf if decibels is None else decibels
