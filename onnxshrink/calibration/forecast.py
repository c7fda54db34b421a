"""Whether a quantized model would saturate on an x86 processor without VNNI, layer by layer, told from any host.

The model's own Q/DQ pairs, run in float, show the 8-bit activations that its kernels would read on a few samples; what
the kernels would lose on them is emulated (see `saturation`). One layer's loss is not fed into the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from onnxshrink.calibration.saturation import (
    HARMLESS_SUM,
    RiskyPairs,
    harmless_in_any_order,
    risky_pairs,
    saturation_loss,
)
from onnxshrink.calibration.unfold import activation_rows, attribute, groups_of, weight_rows
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.session import Session

_SIGN = 128


@dataclass(slots=True)
class LayerForecast:
    """What saturation would do to one layer.

    Attributes:
        node: The node's name.
        weight: Name of its float weights.
        axis: Axis of the weights' scales; None where there is one scale.
        proof: Why nothing can saturate, or None if something can.
        risky_ratio: Share of the pairs of weights that saturate for some activations.
        pairs: Pairs of products that were looked at.
        saturated: Those that saturate.
        signal: Sum of the squared outputs with float weights, without bias.
        error: Sum of the squared errors of 8-bit weights, saturation included.
        reduced_error: The same of 7-bit weights, which cannot saturate.
    """

    node: str
    weight: str
    axis: int | None
    proof: str | None = None
    risky_ratio: float = 0.0
    pairs: int = 0
    saturated: int = 0
    signal: float = 0.0
    error: float = 0.0
    reduced_error: float = 0.0

    @property
    def saturated_ratio(self) -> float:
        """Share of the pairs of products that saturate."""
        return self.saturated / max(1, self.pairs)

    @property
    def sqnr_db(self) -> float:
        """Output against that of float weights: 8-bit weights with saturation."""
        return _decibels(self.signal, self.error)

    @property
    def reduced_sqnr_db(self) -> float:
        """Output against that of float weights: 7-bit weights."""
        return _decibels(self.signal, self.reduced_error)

    @property
    def needs_reduced_range(self) -> bool:
        """True if pairs saturate and 7 bits, which are coarser everywhere, lose less."""
        return self.saturated > 0 and self.reduced_error < self.error

    def __str__(self) -> str:
        if self.proof is not None:
            return f"cannot saturate: {self.proof}"
        if self.saturated == 0:
            return f"0 of {self.pairs:,} pairs saturate ({self.risky_ratio:.2%} of its weight pairs could): 8 bits"
        return (
            f"{self.saturated:,} of {self.pairs:,} pairs saturate: {self.sqnr_db:.1f} dB in 8 bits, "
            f"{self.reduced_sqnr_db:.1f} dB in 7: {7 if self.needs_reduced_range else 8} bits"
        )


@dataclass(frozen=True, slots=True)
class _Product:
    """One group of a layer: its weights, laid out as the kernel reads them.

    Attributes:
        risky: Pairs of 8-bit weights that can saturate.
        scales: Scale of each output channel's 8-bit weights, ``(M,)``.
        weights: With K first: float weights, and what 8 and 7 bits change of them, ``(K, 3 M)``.
    """

    risky: RiskyPairs
    scales: NDArray[np.float32]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A node whose kernel multiplies 8-bit activations with constant 8-bit weights.

    Attributes:
        node: Conv, MatMul or Gemm of the quantized model.
        activation: Name of the 8-bit tensor that it reads.
        is_signed: True if that tensor is int8; the kernels read it as uint8, 128 higher.
        zero_point: Its zero point, as the kernel reads it: 0 to 255.
        kernel: Shape of a Conv's kernel; empty for others.
        products: One for each group; none where nothing can saturate.
        found: What was found so far.
    """

    node: onnx.NodeProto
    activation: str
    is_signed: bool
    zero_point: int
    kernel: tuple[int, ...]
    products: tuple[_Product, ...]
    found: LayerForecast


def forecast_saturation(
    model: onnx.ModelProto, reduced: onnx.ModelProto, original: onnx.ModelProto, batches: Iterable[Batch]
) -> list[LayerForecast]:
    """Emulate every layer of a quantized model on some samples.

    Memory holds the 8-bit activations of one batch, however many batches there are.

    Args:
        model: Quantized to 8 bits in the form ``qdq``, with signed weights.
        reduced: The same with 7-bit weights (``reduce_range``).
        original: The float model.
        batches: Samples; all are run, so the caller bounds them. None are where the weights alone prove enough.

    Returns:
        A forecast for each Conv, MatMul and Gemm whose weights are constant and int8, in graph order.
    """
    layers = list(_layers(model, reduced, original))
    unproven = [layer for layer in layers if layer.found.proof is None]
    if unproven:
        session = _open_activations(model, unproven)
        for batch in batches:
            values = session.run(batch)
            for layer in unproven:
                _look_at(layer, values[layer.activation])
    return [layer.found for layer in layers]


def _look_at(layer: _Layer, values: Array) -> None:
    if layer.is_signed:
        values = (values.astype(np.int16) + _SIGN).astype(np.uint8)
    found = layer.found
    for group, rows in activation_rows(layer.node, values, layer.kernel, layer.zero_point):
        product = layer.products[group]
        channels = product.scales.size
        loss, saturated = saturation_loss(rows, product.risky, channels)
        outputs = (rows.astype(np.float32) - np.float32(layer.zero_point)) @ product.weights
        exact, error, reduced_error = outputs[:, :channels], outputs[:, channels:-channels], outputs[:, -channels:]
        found.pairs += len(rows) * channels * -(-rows.shape[1] // 2)
        found.saturated += saturated
        found.signal += _energy(exact)
        found.error += _energy(error + loss * product.scales)
        found.reduced_error += _energy(reduced_error)


def _layers(model: onnx.ModelProto, reduced: onnx.ModelProto, original: onnx.ModelProto) -> Iterator[_Layer]:
    constants, seven_bits, floats = (_constants(each) for each in (model, reduced, original))
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        activation, weight = (dequantized.get(name) for name in node.input[:2])
        if activation is None or weight is None or activation.input[0] in constants:
            continue
        quantized = constants.get(weight.input[0])
        if quantized is None or quantized.dtype != np.int8:
            continue
        scales = constants[weight.input[1]]
        name = weight.input[0].removesuffix(TENSOR_NAME_QUANT_SUFFIX)
        found = LayerForecast(node.name, name, attribute(weight, "axis", 1) if scales.size > 1 else None)
        risky = _risky_groups(node, quantized, found)
        eight, channel_scales = _dequantized_rows(node, weight, constants)
        seven, _ = _dequantized_rows(node, weight, seven_bits)
        zero_point = constants[activation.input[2]]
        yield _Layer(
            node=node,
            activation=activation.input[0],
            is_signed=zero_point.dtype == np.int8,
            zero_point=int(zero_point.item()) + (_SIGN if zero_point.dtype == np.int8 else 0),
            kernel=quantized.shape[2:],
            products=tuple(_products(weight_rows(node, floats[name]), eight, seven, channel_scales, risky)),
            found=found,
        )


def _risky_groups(node: onnx.NodeProto, quantized: NDArray[np.int8], found: LayerForecast) -> list[RiskyPairs]:
    """Each group's pairs that can saturate; none, and the proof in ``found``, where there are no such pairs."""
    if groups_of(node) > 1 and quantized.shape[:2] == (groups_of(node), 1):
        found.proof = "its depthwise kernel adds in 32 bits"
        return []
    rows = weight_rows(node, quantized)
    risky = [risky_pairs(group) for group in rows]
    found.risky_ratio = sum(pairs.size for pairs in risky) / max(
        1, rows.shape[0] * rows.shape[1] * -(-rows.shape[2] // 2)
    )
    if all(harmless_in_any_order(group) for group in rows):
        found.proof = f"no two weights of a channel sum to more than {HARMLESS_SUM}"
    elif found.risky_ratio == 0:
        found.proof = f"no two weights that are added sum to more than {HARMLESS_SUM}"
    return [] if found.proof else risky


def _products(
    exact: Array, eight: Array, seven: Array, scales: Array, risky: Iterable[RiskyPairs]
) -> Iterator[_Product]:
    for group, pairs in enumerate(risky):
        sides = (exact[group], eight[group] - exact[group], seven[group] - exact[group])
        yield _Product(pairs, scales[group, :, 0], np.concatenate(sides).T)


def _dequantized_rows(
    node: onnx.NodeProto, weight: onnx.NodeProto, constants: Mapping[str, Array]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights that a DequantizeLinear gives, ``(groups, M, K)``, and their scales, ``(groups, M, 1)``."""
    rows = weight_rows(node, constants[weight.input[0]]).astype(np.float32)
    scales, zero_points = (
        np.broadcast_to(constants[name].reshape(-1), rows.shape[0] * rows.shape[1]).reshape(*rows.shape[:2], 1)
        for name in weight.input[1:3]
    )
    return (rows - zero_points.astype(np.float32)) * scales, scales


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _open_activations(model: onnx.ModelProto, layers: Iterable[_Layer]) -> Session:
    """A session whose outputs are the 8-bit activations that the layers read.

    ONNX Runtime's own optimization is off: Q and DQ are computed one by one, on every processor alike.
    """
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.INT8 if signed else TensorProto.UINT8, None)
        for name, signed in {layer.activation: layer.is_signed for layer in layers}.items()
    )
    return Session(shown.SerializeToString(), optimization="disabled", name="the quantized model")


def _energy(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
