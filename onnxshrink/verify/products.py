"""The product inside a piece: its weights in 8 bits beside the float ones, its bias, and what saturation would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxshrink.calibration.saturation import RiskyPairs, risky_pairs, saturation_loss
from onnxshrink.calibration.unfold import activation_rows, groups_of, weight_rows
from onnxshrink.core.tensors import Array
from onnxshrink.verify.pairing import Pair, Piece
from onnxshrink.verify.pieces import Grid, constants_of, grid_of

INT32_MAX = (1 << 31) - 1
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SIGN = 128


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a node as both models have them.

    Attributes:
        exact: The reference's, one row for each output channel, ``(M, K)`` float.
        restored: The candidate's, dequantized, ``(M, K)`` float.
        bits: Bits that a stored weight has.
        scales: How many scales they have.
    """

    exact: NDArray[np.float64]
    restored: NDArray[np.float64]
    bits: int
    scales: int


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias in int32.

    Attributes:
        stored: ``(M,)`` int32.
        scale: Its scales, ``(M,)`` or ``(1,)``.
        exact: The reference's bias, ``(M,)``; None where it has none.
    """

    stored: Array
    scale: Array
    exact: Array | None

    @property
    def overflows(self) -> bool:
        """True where a value stands at the end of int32, or would have to lie beyond it."""
        stored = np.abs(self.stored.astype(np.int64))
        if bool((stored >= INT32_MAX).any()):
            return True
        return self.exact is not None and bool((np.abs(self.exact.astype(np.float64)) / self.scale > INT32_MAX).any())


@dataclass(frozen=True, slots=True)
class Product:
    """The node of a piece that multiplies with constant weights.

    Attributes:
        node: The candidate's Conv, ConvTranspose, Gemm or MatMul.
        activation: The candidate's tensor that it multiplies, before it is quantized; None where it stays in float.
        grid: How that is stored.
        weights: None where both models' weights cannot be laid side by side.
        bias: None where there is none in int32.
        risky: For each group the pairs of weights that can saturate on x86 without VNNI; none where no kernel would.
        weight_scale: Scale of each channel of each group, ``(groups, M)``; empty where they are in blocks.
        kernel: Shape of a Conv's kernel.
    """

    node: onnx.NodeProto
    activation: str | None
    grid: Grid | None
    weights: Weights | None
    bias: Bias | None
    risky: tuple[RiskyPairs, ...]
    weight_scale: NDArray[np.float64]
    kernel: tuple[int, ...]

    def saturation(self, values: Array) -> float:
        """Energy of what saturation takes from the results on these activations.

        Args:
            values: The activations in float, as the reference has them.
        """
        if self.grid is None or not any(risky.size for risky in self.risky):
            return 0.0
        signed = self.grid.dtype == "int8"
        stored = self.grid.stored(values)
        rows_of = (stored.astype(np.int16) + _SIGN).astype(np.uint8) if signed else stored
        zero_point = self.grid.zero_point + (_SIGN if signed else 0)
        energy = 0.0
        for group, rows in activation_rows(self.node, rows_of, self.kernel, zero_point):
            scale = self.weight_scale[group] * self.grid.scale
            loss, _ = saturation_loss(rows, self.risky[group], scale.size)
            energy += float(np.sum(np.square(loss * scale)))
        return energy

    def most_accumulated(self, results: Array) -> float:
        """The largest sum in units of the product of both scales, as a share of what int32 holds.

        Args:
            results: The results in float before they are quantized.
        """
        if self.grid is None or not self.weight_scale.size:
            return 0.0
        axis = 1 if self.node.op_type.startswith("Conv") else -1
        channels = np.moveaxis(np.abs(results.astype(np.float64)), axis, -1)
        scales = self.weight_scale.reshape(-1)
        if channels.shape[-1] != scales.size:
            return 0.0
        return float(np.max(channels.reshape(-1, scales.size) / (scales * self.grid.scale), initial=0.0)) / INT32_MAX


def product_of(piece: Piece, pair: Pair) -> Product | None:
    """The product of a piece; None where it has none with constant weights, or several."""
    constants, tensors = pair.candidate.constants, pair.candidate
    nodes = [
        node for node in piece.nodes if node.op_type in _PRODUCTS and len(node.input) > 1 and node.input[1] in constants
    ]
    if len(nodes) != 1:
        return None
    node = nodes[0]
    maker = tensors.maker.get(node.input[1])
    if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) < 2:
        return None
    values = constants_of(tensors, (node.input[1], *maker.input))
    stored = values[maker.input[0]]
    scales = np.asarray(values[maker.input[1]], np.float64).reshape(-1)
    activation, grid = _activation(node, pair)
    is_matrix = stored.ndim == 2 or node.op_type == "Conv"
    channels = weight_rows(node, stored) if is_matrix else None
    per_channel: NDArray[np.float64] = np.zeros((0, 0), np.float64)
    risky: tuple[RiskyPairs, ...] = ()
    if channels is not None and scales.size in {1, channels.shape[0] * channels.shape[1]}:
        per_channel = np.broadcast_to(scales, channels[..., 0].size).reshape(len(channels), -1)
        depthwise = groups_of(node) > 1 and stored.shape[:2] == (groups_of(node), 1)
        if stored.dtype == np.int8 and grid is not None and grid.dtype in {"int8", "uint8"} and not depthwise:
            risky = tuple(risky_pairs(group) for group in channels)
    return Product(
        node=node,
        activation=activation,
        grid=grid,
        weights=_weights(node, piece, pair, values) if is_matrix else None,
        bias=_bias(node, piece, pair),
        risky=risky,
        weight_scale=per_channel,
        kernel=stored.shape[2:],
    )


def _activation(node: onnx.NodeProto, pair: Pair) -> tuple[str | None, Grid | None]:
    tensors = pair.candidate
    maker = tensors.maker.get(node.input[0])
    quantizer = tensors.maker.get(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return None, None
    return quantizer.input[0], grid_of(quantizer, tensors)


def _partner(node: onnx.NodeProto, piece: Piece, pair: Pair) -> onnx.NodeProto | None:
    """The reference's node of the same kind."""
    name = piece.raw if node.output[0] == piece.tensor else pair.stands_for.get(node.output[0], piece.raw)
    partner = pair.reference.maker.get(name)
    return partner if partner is not None and partner.op_type == node.op_type else None


def _weights(node: onnx.NodeProto, piece: Piece, pair: Pair, values: Mapping[str, Array]) -> Weights | None:
    partner = _partner(node, piece, pair)
    if partner is None:
        return None
    maker, restored = pair.candidate.maker[node.input[1]], values[node.input[1]]
    exact = constants_of(pair.reference, partner.input[1:2]).get(partner.input[1])
    if exact is None or exact.shape != restored.shape:
        return None
    rows = [weight_rows(each, weights) for each, weights in ((partner, exact), (node, restored))]
    flat = [each.reshape(-1, each.shape[-1]).astype(np.float64) for each in rows]
    bits = values[maker.input[0]].dtype.itemsize * 8
    return Weights(flat[0], flat[1], bits, values[maker.input[1]].size)


def _bias(node: onnx.NodeProto, piece: Piece, pair: Pair) -> Bias | None:
    if len(node.input) < 3:
        return None
    maker = pair.candidate.maker.get(node.input[2])
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in pair.candidate.constants:
        return None
    values = constants_of(pair.candidate, maker.input[:2])
    partner = _partner(node, piece, pair)
    exact = constants_of(pair.reference, partner.input[2:3]) if partner is not None else {}
    stored, scale = values[maker.input[0]], np.asarray(values[maker.input[1]], np.float64).reshape(-1)
    return Bias(stored, scale, next(iter(exact.values()), None)) if stored.dtype == np.int32 else None
